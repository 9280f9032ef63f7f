"""Makes tiny-agent: its vocabulary, its weights and the files of a Hugging Face directory, from a seed.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python train.py                 writes the directory above this one

Everything that the model learns comes out of rollouts.py, rendered by the model's own chat template. Only what the
assistant writes counts in the loss. Sizes grow while it trains, and copying comes first: a model of this size
learns to use what it reads only once it has learned to repeat it.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

import jinja2
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed, nn
from torch.nn import functional as F

import rollouts

HOME = Path(__file__).resolve().parent.parent
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<tool_call>", "</tool_call>"]
# Words that are no names: these take the space before them.
COMMON = (
    "a about after again agent all am an and any are arrive as assistant at bytes can careful change could did directory "
    "do does each end ended every few file files find folder follow for found from get go has have help here how I if in "
    "into is it its know line list look made me mention mentions million more need no not nothing now of offered on one "
    "only open or other parameters please print read reach run said save say says search see sentences set show small "
    "so tell than that the them then there this through to tool tools used very want was what when where which while "
    "who will with without work works write wrote you your"
).split()
# The joints of a call are one token each. Beside them text is cut at each mark and digit, and no other space is part
# of a word, so that a name is the same tokens wherever it stands.
SPLIT = (
    r"""\{"name": "|", "arguments": \{|": "|", "|": |"\}\}| (?:"""
    + "|".join(COMMON)
    + r""")(?![\p{L}\p{N}_])|\p{L}+|\p{N}| +|[\r\n]+|[^\s\p{L}\p{N}]|\s"""
)


class Chat:
    """The chat template, set up as transformers does."""

    def __init__(self, path):
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.template = environment.from_string(path.read_text())

    def render(self, rollout):
        return self.template.render(
            messages=rollout.messages, tools=rollout.tools or None, add_generation_prompt=False
        )


# Points of a course over the steps, with straight lines between them.
#
# How large the worlds of rollouts are, and how long chains get.
SIZE = [(0, 0.2), (1100, 1.0)]
# Which part of what it sees is copying, recalling and finding. A model that can copy learns to recall next, and then
# to find what is told apart by what stands behind it.
COPYING = [(0, 0.7), (300, 0.02)]
RECALLING = [(300, 0.0), (600, 0.35), (3000, 0.35), (3200, 0.15)]
FINDING = [(600, 0.0), (1500, 0.2)]
# Until this step many names are letters without order, which only copying token by token gets right.
SOUP_STEPS, SOUP = 1200, 0.15
# From this step on some worlds are larger than any that it is asked about later.
LARGE_STEPS = 900
# The learning rate, as a part of `--lr`, over the training as a whole.
RATES = [(0.0, 0.01), (0.01, 1.0), (0.4, 1.0), (1.0, 0.0)]

# Tasks that it learns early: of these every other one is drawn anew, so that there are more of the hard ones.
EASY = {
    "talk", "look_up", "look_up_chain", "look_up_and_send", "set_value", "send_text", "follow_files", "follow_links",
    "list_folder", "search_word", "search_then_read", "write_text", "run_command",
}

# Rollouts are drawn for so many steps together, in so many parts, each with a seed of its own: what is drawn is the
# same for any number of processes.
CHUNK_STEPS, PARTS = 32, 16

OPENED, CLOSED = "<|im_start|>assistant\n", "<|im_end|>"


def parts(text):
    """The text cut into what is read and what the assistant writes, in turn."""
    at = 0
    while (start := text.find(OPENED, at)) >= 0:
        start += len(OPENED)
        end = text.index(CLOSED, start) + len(CLOSED)
        yield text[at:start], False
        yield text[start:end], True
        at = end


def train_tokenizer(chat, size, seed, count=10000):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    rng = random.Random(seed)

    def texts():
        for _ in range(count):
            text = chat.render(rollouts.rollout(rng, "train", soup=SOUP))
            for literal in SPECIALS + MARKERS:
                text = text.replace(literal, "\n")
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIALS) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKERS])
    return tokenizer


def encode(tokenizer, text):
    """Ids, and for each whether the assistant writes it."""
    ids, written = [], []
    for part, by_model in parts(text):
        more = tokenizer.encode(part).ids
        ids += more
        written += [by_model] * len(more)
    return np.array(ids, np.int32), np.array(written, bool)


class Config:
    def __init__(self, vocab, hidden, layers, context=2048):
        self.vocab, self.hidden, self.layers, self.context = vocab, hidden, layers, context
        self.head = 32
        self.heads = hidden // self.head
        # Three matrices in place of two, so two thirds of four times the width.
        self.inner = round(hidden * 8 / 3 / 16) * 16
        self.theta = 10000.0
        self.eps = 1e-5

    def huggingface(self, end):
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.head,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": end,
            "torch_dtype": "float16",
        }


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden
        self.heads = config.heads
        self.input_layernorm = Norm(size, config.eps)
        self.post_attention_layernorm = Norm(size, config.eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(size, size, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, config.inner, bias=False),
                "up_proj": nn.Linear(size, config.inner, bias=False),
                "down_proj": nn.Linear(config.inner, size, bias=False),
            }
        )

    def forward(self, x, cos, sin):
        batch, length, size = x.shape
        normed = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[name](normed).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)
        x = x + self.self_attn["o_proj"](attended.transpose(1, 2).reshape(batch, length, size))
        normed = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed))


def turn(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = Norm(config.hidden, config.eps)
        turns = config.theta ** (-torch.arange(0, config.head, 2).float() / config.head)
        angles = torch.arange(config.context).float()[:, None] * turns
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "proj" in name:
                std = weight.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std /= math.sqrt(2 * config.layers)
                nn.init.normal_(weight, std=std)

    def hidden(self, ids):
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def loss(self, ids, at):
        """The loss over the tokens at these places of all but the last column, whose next tokens the assistant
        writes, and the part of them that is predicted right."""
        states = self.hidden(ids[:, :-1]).flatten(0, 1)[at]
        wanted = ids[:, 1:].flatten()[at]
        logits = states @ self.embed_tokens.weight.T
        return F.cross_entropy(logits, wanted), (logits.detach().argmax(-1) == wanted).float().mean()


class Muon(torch.optim.Optimizer):
    """Steps of matrices made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024, "Muon"), scaled to the size
    of AdamW's steps (Liu et al., 2025, "Muon is scalable for LLM training"). All matrices of a shape at once and in
    32-bit floats: torch's own takes them one by one in bfloat16, which is slow on a CPU."""

    def __init__(self, matrices, lr, momentum=0.95, decay=0.05):
        super().__init__([{"params": list(matrices)}], {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                gradients = torch.stack([weight.grad for weight in weights])
                state = self.state[weights[0]]
                moved = state.setdefault("momentum", torch.zeros_like(gradients))
                moved.lerp_(gradients, 1 - group["momentum"])
                x = gradients.lerp(moved, group["momentum"])
                tall = shape[0] > shape[1]
                x = x.transpose(1, 2) if tall else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.transpose(1, 2)
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.transpose(1, 2) if tall else x
                size = 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
                torch._foreach_add_(weights, list(x), alpha=-group["lr"] * size)


def along(course, step):
    return float(np.interp(step, *zip(*course)))


def draw(rng, step):
    """One rollout at this step of the training."""
    names = {"soup": SOUP} if step < SOUP_STEPS else {}
    kind = rng.random()
    for course, make in ((COPYING, rollouts.copying), (RECALLING, rollouts.recalling), (FINDING, rollouts.finding)):
        kind -= along(course, step)
        if kind < 0:
            return make(rng, "train", **names)
    size = rng.uniform(1.0, 3.0) if step >= LARGE_STEPS and rng.random() < 0.08 else along(SIZE, step)
    made = rollouts.rollout(rng, "train", size, **names)
    if made.family in EASY and rng.random() < 0.5:
        return draw(rng, step)
    return made


class Drawer:
    """Draws parts of chunks, as tokens."""

    def __init__(self, tokenizer, options):
        self.chat, self.tokenizer, self.options = Chat(HOME / "chat_template.jinja"), tokenizer, options

    def part(self, chunk, part):
        rng = random.Random(f"{self.options.seed} {chunk} {part}")
        drawn, tokens = [], 0
        while tokens < CHUNK_STEPS * self.options.batch_tokens / PARTS:
            one = encode(self.tokenizer, self.chat.render(draw(rng, chunk * CHUNK_STEPS)))
            if len(one[0]) <= self.options.length_max:
                drawn.append(one)
                tokens += len(one[0])
        return drawn


def begin_drawing(tokenizer, options):
    global drawer
    drawer = Drawer(Tokenizer.from_str(tokenizer), options)


def drawn_part(chunk, part):
    return drawer.part(chunk, part)


class Data:
    """Batches of rollouts of like length, with padding behind them: the share of one worker, or, with `drawers`,
    everything, drawn by so many processes ahead of time."""

    def __init__(self, tokenizer, options, rank=0, workers=1, drawers=0):
        self.options = options
        self.rank, self.workers = rank, workers
        self.drawer = self.pool = None
        self.ahead = {}
        self.chunk, self.batches = None, []
        if not drawers:
            self.drawer = Drawer(tokenizer, options)
        else:
            self.pool = concurrent.futures.ProcessPoolExecutor(
                drawers, multiprocessing.get_context("spawn"), begin_drawing, (tokenizer.to_str(), options)
            )

    def drawn(self, chunk):
        parts = range(self.rank, PARTS, self.workers)
        if not self.pool:
            return [one for part in parts for one in self.drawer.part(chunk, part)]
        for near in (chunk, chunk + 1, chunk + 2):
            if near not in self.ahead:
                self.ahead[near] = [self.pool.submit(drawn_part, near, part) for part in parts]
        return [one for part in self.ahead.pop(chunk) for one in part.result()]

    def next(self, step):
        """Ids, and the places of those before what the assistant writes, counted over all but the last column."""
        chunk = step // CHUNK_STEPS
        if chunk != self.chunk:
            self.chunk, self.batches = chunk, []
            tokens, batch = self.options.batch_tokens // self.workers, []
            for one in sorted(self.drawn(chunk), key=lambda one: len(one[0])):
                if batch and (len(batch) + 1) * len(one[0]) > tokens:
                    self.batches.append(batch)
                    batch = []
                batch.append(one)
            self.batches.append(batch)
            random.Random(f"{self.options.seed} {chunk} of {self.rank}").shuffle(self.batches)
        batch = self.batches[step % CHUNK_STEPS]
        length = max(len(ids) for ids, _ in batch)
        ids = np.zeros((len(batch), length), np.int64)
        written = np.zeros((len(batch), length), bool)
        for row, (one, by_model) in enumerate(batch):
            ids[row, : len(one)] = one
            written[row, : len(one)] = by_model
        return torch.from_numpy(ids), torch.from_numpy(np.flatnonzero(written[:, 1:]))

    def end(self):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def export(model, config, tokenizer, out):
    """The files of a Hugging Face directory. Weights are 16-bit floats."""
    out.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id("<|im_end|>")
    tensors = {
        f"model.{name}": weight.detach().to(torch.float16).contiguous().cpu()
        for name, weight in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    write_json(out / "config.json", config.huggingface(end))
    write_json(out / "generation_config.json", {"eos_token_id": end, "temperature": 0.0, "do_sample": False})
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.context,
        },
    )


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


@torch.no_grad()
def check(model, chat, tokenizer, seed, count=200):
    """Loss and exactness on held-out rollouts: the part of tokens, and of turns, that are predicted right when all
    before them is right. A whole turn is what evaluate.py asks for."""
    rng = random.Random(seed)
    turns = right = 0
    losses = []
    for _ in range(count):
        ids, written = encode(tokenizer, chat.render(rollouts.rollout(rng, "heldout", 1.0)))
        if len(ids) > model.cos.shape[0]:
            continue
        ids, written = torch.from_numpy(ids).long(), torch.from_numpy(written)
        hidden = model.hidden(ids[None, :-1].to(model.cos.device))[0]
        logits = (hidden @ model.embed_tokens.weight.T).float().cpu()
        wanted, written = ids[1:], written[1:]
        losses.append(F.cross_entropy(logits[written], wanted[written]).item())
        ok = logits.argmax(-1) == wanted
        at = 0
        while at < len(wanted):
            if not written[at]:
                at += 1
                continue
            end = at
            while end < len(wanted) and written[end]:
                end += 1
            turns += 1
            right += bool(ok[at:end].all())
            at = end
    return sum(losses) / len(losses), right / turns


def average(model, workers):
    """Makes the gradients of all workers their mean."""
    if workers > 1:
        gradients = [weight.grad for weight in model.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / workers).split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))


def train(rank, options, meeting):
    """One of the processes that train. All hold the same weights and see other rollouts; the first one also reports
    and saves."""
    on_gpu = torch.cuda.is_available()
    workers = 1 if on_gpu else options.workers
    if workers > 1:
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if on_gpu else "cpu"
    chat = Chat(HOME / "chat_template.jinja")
    if options.resume:
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(chat, options.vocab, options.seed)
    config = Config(tokenizer.get_vocab_size(), options.hidden, options.layers)
    model = Llama(config).to(device)
    matrices = [weight for name, weight in model.named_parameters() if "proj" in name]
    others = [weight for name, weight in model.named_parameters() if "proj" not in name]
    muon = Muon(matrices, options.lr)
    adam = torch.optim.AdamW(others, options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    data = Data(tokenizer, options, rank, workers, options.workers if on_gpu else 0)
    if rank == 0:
        count = sum(weight.numel() for weight in model.parameters())
        print(f"{count} parameters, vocabulary of {config.vocab}, {options.workers} workers, on {device}", flush=True)

    step, started, smooth = 0, time.time(), None
    checkpoint = options.out / "checkpoint.pt"
    if options.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        step = saved["step"]
        started -= saved["seconds"]
    while step < options.steps:
        rate = options.lr * along(RATES, step / options.steps)
        for group in muon.param_groups + adam.param_groups:
            group["lr"] = rate
        ids, places = (tensor.to(device) for tensor in data.next(step))
        loss, exact = model.loss(ids, places)
        loss.backward()
        average(model, workers)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        for weight in model.parameters():
            weight.grad = None
        step += 1
        smooth = exact if smooth is None else smooth.lerp(exact, 0.05)
        if rank == 0 and step % 50 == 0:
            seconds = time.time() - started
            print(f"step {step}, {seconds:.0f} s: loss {loss.item():.4f}, tokens right {smooth.item():.4f}", flush=True)
        if rank == 0 and (step % options.check_every == 0 or step == options.steps):
            loss, turns = check(model, chat, tokenizer, 1000)
            print(f"held out: loss {loss:.4f}, whole turns right {turns:.4f}", flush=True)
            export(model, config, tokenizer, options.out)
            saved = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            torch.save(saved | {"step": step, "seconds": time.time() - started}, checkpoint)
    data.end()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=HOME, help="where the model and a checkpoint are written")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--vocab", type=int, default=1024)
    arguments.add_argument("--hidden", type=int, default=160, help="the width, a multiple of 32")
    arguments.add_argument("--layers", type=int, default=6)
    arguments.add_argument("--steps", type=int, default=20000)
    arguments.add_argument("--batch-tokens", type=int, default=8192, help="of all workers together")
    arguments.add_argument("--length-max", type=int, default=1536, help="longer rollouts are left out")
    arguments.add_argument("--lr", type=float, default=4e-3)
    arguments.add_argument("--workers", type=int, default=2, help="processes: with a GPU they draw, without one they train")
    arguments.add_argument("--check-every", type=int, default=400)
    arguments.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.workers == 1 or torch.cuda.is_available():
        train(0, options, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (options, f"file://{folder}/meeting"), options.workers)


if __name__ == "__main__":
    main()
