"""The rollouts that tiny-agent learns from: conversations of an agent with tools, made from nothing but a seed.

Every call and every answer is the one right one: what a user asks decides the calls, the outputs of the calls decide
the next ones, and facts of the outputs make the answer. What they are about comes out of worlds.py; the words of the
requests and of the answers are the same in both splits.

    python rollouts.py --split heldout --seed 7 --count 3      prints some
"""

import argparse
import json
import random
from dataclasses import dataclass, field

from worlds import KEYS, World, shown

NAME = "tiny-agent"
IDENTITY = (
    f"I am {NAME}, a model of about 2 million parameters that was trained only to use tools. "
    "I can list, read, search and write files, run commands and call other simple tools, where they are offered. "
    "I know nothing else."
)
BEYOND = (
    f"That is more than I can do. I am {NAME}, a very small model: I can call tools and tell what they said. "
    "Ask me what is in a folder or a file, where a word occurs, or what a value is."
)
NO_TOOL = "I have no tool for that."


# How much of a file is read at once.
LINES = 40


@dataclass
class Rollout:
    """A conversation in the form of chat completions. Assistant messages are what the model should write."""

    family: str
    messages: list = field(default_factory=list)
    tools: list = field(default_factory=list)

    def user(self, text):
        self.messages.append({"role": "user", "content": text})

    def call(self, *calls, shuffled=None, said=""):
        """Calls made at once, each `(name, arguments, output)`. Outputs come back in order, or shuffled."""
        at = len(self.messages)
        made, outputs = [], []
        for index, (name, arguments, output) in enumerate(calls):
            call_id = f"call_{at}_{index}"
            made.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
            outputs.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": output})
        if shuffled:
            shuffled.shuffle(outputs)
        self.messages.append({"role": "assistant", "content": said, "tool_calls": made})
        self.messages.extend(outputs)

    def answer(self, text):
        self.messages.append({"role": "assistant", "content": text})


def listed(parts):
    """A list as the model writes it: each on a line of its own, as in what it reads, so that the end of what it
    copies from is the end of its answer."""
    return "".join(f"{part}\n" for part in parts)


def joined(parts):
    """As people write lists."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def tool(name, description, /, **parameters):
    """A function tool; a parameter whose type begins with `?` may be left out."""
    properties = {key: {"type": kind.lstrip("?")} for key, kind in parameters.items()}
    required = [key for key, kind in parameters.items() if not kind.startswith("?")]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


FILE_TOOLS = {
    "list_dir": tool("list_dir", "List a directory.", path="string", depth="?integer"),
    "read_file": tool(
        "read_file", "Read a text file, or some of its lines.", path="string", first_line="?integer", lines="?integer"
    ),
    "search": tool(
        "search", "Find the lines of text files that match a regular expression.", pattern="string", path="?string"
    ),
    "write_file": tool("write_file", "Create a text file, or replace one.", path="string", content="string"),
    "run_command": tool(
        "run_command", "Run a shell command and get its output and exit status.", command="string"
    ),
}
# What `hotloop agent` says.
AGENT = (
    "You are a careful agent that works on the files of one directory. "
    "You reach them only through your tools, and every path is relative to that directory. "
    "Look at what is there before you change anything. When the task is done, say in a few "
    "sentences what you found or did, without calling a tool."
)
SYSTEMS = [
    "You are a helpful assistant.",
    "You are an agent with tools.",
    "Answer in short sentences.",
    "Use the tools to answer the question.",
    "You help people with their files. Be brief and do not guess.",
    "You are an assistant of the team. Only say what the tools tell you.",
]


def read(path, output):
    """A call that reads the beginning of a file."""
    return ("read_file", {"path": path, "lines": LINES}, output)


def quoted(w, text):
    return w.pick(text, text, text, f"`{text}`", f'"{text}"', f"'{text}'")


def phrase(w, text):
    """The ways in which people begin and end what they ask."""
    if w.chance(0.12):
        text = w.pick("please ", "can you ", "could you ", "I want you to ", "now ", "hey, ") + text[0].lower() + text[1:]
    if w.chance(0.3):
        text = text[0].lower() + text[1:]
    if text.endswith("?") or text.endswith("."):
        return text[:-1] if w.chance(0.25) else text
    return text + w.pick("", "", ".", " please", "?") if w.chance(0.5) else text


# Tasks on files. Each asks something of `r` and brings it to its answer.


def list_folder(w, r):
    here = w.chance(0.5)
    folder = "." if here else w.folder()
    if here:
        ask = w.pick(
            "What is in this folder?",
            "What is here?",
            "What's in this directory?",
            "List the files",
            "List the files here",
            "Which files are there?",
            "Show me the files in this folder",
            "What files do I have here?",
            "ls",
            "Look around and tell me what you see",
            "List this directory",
            "Tell me what is in the current directory",
            "What does this folder contain?",
        )
    else:
        at = quoted(w, folder + w.pick("", "", "/"))
        ask = w.pick(
            f"What is in {at}?",
            f"What's in the folder {at}?",
            f"List the files in {at}",
            f"Which files are in {at}?",
            f"Show me what {at} contains",
            f"List {at}",
            f"What does the directory {at} hold?",
            f"What files are there in {at}?",
            f"ls {at}",
        )
    r.user(phrase(w, ask))
    names = [] if w.chance(0.04) else w.entries(1, 14)
    r.call(("list_dir", {"path": folder}, w.listing(names)))
    place = "This folder" if here else folder
    r.answer(f"{place} is empty." if not names else f"{place} has:\n{listed(names)}")


def read_text(w, r):
    path = w.path()
    at = quoted(w, path)
    ask = w.pick(
        f"What does {at} say?",
        f"What is in the file {at}?",
        f"Read {at}",
        f"Show me {at}",
        f"What's in {at}?",
        f"How does {at} begin?",
        f"What is {at} about?",
        f"Open {at} and tell me what it says",
        f"Summarize {at}",
        f"cat {at}",
        f"Tell me about {at}",
        f"Explain {at}",
        f"What does {at} do?",
    )
    r.user(phrase(w, ask))
    kind = w.rng.random()
    if kind < 0.06:
        r.call(read(path, "error: No such file or directory (os error 2)"))
        r.answer(f"I could not read {path}: No such file or directory.")
        return
    if kind < 0.09:
        r.call(read(path, "error: this is not a text file"))
        r.answer(f"I could not read {path}: this is not a text file.")
        return
    if kind < 0.12:
        r.call(read(path, ""))
        r.answer(f"{path} is empty.")
        return
    lines = w.settings(w.pairs()) if w.chance(0.12) else w.text()
    more = w.rng.randint(1, 900) if w.chance(0.2) else 0
    r.call(read(path, shown(lines, more)))
    r.answer(begins(path, lines))


def begins(path, lines):
    """Its first line, and the one after a heading."""
    kept = []
    for line in lines:
        kept.append(line)
        if line.strip() and not line.startswith("# "):
            break
    return f"{path} begins: " + "\n".join(kept).strip()


def asks_value(w, key, at):
    key = key.replace("_", w.pick("_", " "))
    return w.pick(
        f"What is the {key} in {at}?",
        f"What's the {key} in {at}?",
        f"Which {key} does {at} have?",
        f"Tell me the {key} from {at}",
        f"Find the {key} in {at}",
        f"Read the {key} from {at}",
        f"Look up the {key} in {at}",
        f"Look into {at} and tell me the {key}",
        f"In {at}, what is the {key}?",
        f"Get {key} from {at}",
        f"What {key} is set in {at}?",
        f"Open {at} and tell me the {key}",
    )


def read_value(w, r):
    path = w.path()
    if w.chance(0.4):
        path = w.pick(w.path(w.pick("toml", "json", "yaml", "ini", "cfg", "txt", "env")), w.rng.choice(MANIFESTS))
    pairs = w.pairs()
    lines = w.manifest(path, pairs) if path in MANIFESTS else w.settings(pairs)
    if w.chance(0.3) and path not in MANIFESTS:
        lines = [w.line() for _ in range(w.upto(1, 4))] + lines
    missing = w.chance(0.1)
    key, value = w.rng.choice(pairs)
    if missing:
        key = w.rng.choice([k for k in KEYS if all(k not in other for other, _ in pairs)])
    r.user(phrase(w, asks_value(w, key, quoted(w, path))))
    more = w.rng.randint(1, 300) if w.chance(0.15) else 0
    r.call(read(path, shown(lines, more)))
    r.answer(f"{path} has no {key}." if missing else f"The {key} in {path} is {value}.")


def read_values(w, r):
    """The same key of several files, read at once."""
    paths = w.paths(w.rng.choice((2, 2, 2, 3, 3, 4)))
    key = w.keys(1)[0]
    values = w.values(len(paths))
    names = joined(quoted(w, path) for path in paths)
    ask = w.pick(
        f"What is the {key} in {names}?",
        f"Tell me the {key} in {names}",
        f"Read the {key} from {names}",
        f"Get the {key} of {names}",
        f"Compare the {key} in {names}",
        f"Look up the {key} in {names}",
    )
    r.user(phrase(w, ask))
    calls = []
    for path, value in zip(paths, values):
        pairs = [pair for pair in w.pairs(0, 4) if pair[0] != key]
        pairs.insert(w.rng.randint(0, len(pairs)), (key, value))
        calls.append(read(path, shown(w.settings(pairs))))
    r.call(*calls, shuffled=w.rng if w.chance(0.3) else None)
    r.answer("\n".join(f"The {key} in {path} is {value}." for path, value in zip(paths, values)))


def read_both(w, r):
    """How several files begin, read at once."""
    paths = w.paths(w.rng.choice((2, 2, 3)))
    names = joined(quoted(w, path) for path in paths)
    ask = w.pick(
        f"What do {names} say?",
        f"Read {names}",
        f"Show me {names}",
        f"How do {names} begin?",
        f"Read the files {names}",
        f"Summarize {names}",
    )
    r.user(phrase(w, ask))
    texts = [w.text(1, 4) for _ in paths]
    r.call(
        *(read(path, shown(lines)) for path, lines in zip(paths, texts)),
        shuffled=w.rng if w.chance(0.3) else None,
    )
    r.answer("\n".join(begins(path, lines) for path, lines in zip(paths, texts)))


def matches(w, pattern, count):
    """Lines that search would find: `(path, line, text)`."""
    found = []
    for path in sorted(w.paths(count)):
        before, after = w.line().strip(), w.pick("", " " + w.word(), "(" + w.word() + ")", ";")
        found.append((path, w.rng.randint(1, 400), f"{before} {pattern}{after}" if w.chance(0.7) else f"{pattern}{after}"))
    return found


def search_word(w, r):
    pattern = w.pick("TODO", "FIXME", w.identifier(), w.identifier(), w.identifier(), w.word(), w.word())
    at = quoted(w, pattern)
    folder = w.folder() if w.chance(0.25) else None
    ask = w.pick(
        f"Where is {at}?",
        f"Where is {at} used?",
        f"Where does {at} occur?",
        f"Search for {at}",
        f"Find {at}",
        f"Find all {at}",
        f"Which files mention {at}?",
        f"Which files contain {at}?",
        f"grep {at}",
        f"Where is {at} defined?",
        f"Who uses {at}?",
        f"Look for {at}",
        f"Find every mention of {at}",
        f"In which file is {at}?",
        f"Are there any {at}?",
    )
    if folder:
        ask = ask.rstrip("?") + f" in {quoted(w, folder)}" + ("?" if ask.endswith("?") else "")
    r.user(phrase(w, ask))
    found = [] if w.chance(0.12) else matches(w, pattern, w.upto(1, 10))
    output = "".join(f"{path}:{line}: {text}\n" for path, line, text in found) or "no matches\n"
    arguments = {"pattern": pattern, "path": folder} if folder else {"pattern": pattern}
    r.call(("search", arguments, output))
    places = listed(f"{path}:{line}" for path, line, _ in found)
    r.answer(f"{pattern} is in:\n{places}" if found else f"I found no {pattern}.")


def search_then_read(w, r):
    """The file that mentions one thing, and a value in it."""
    pattern, path = w.pick(w.identifier(), w.word()), w.path()
    pairs = w.pairs(1, 5)
    key, value = w.rng.choice(pairs)
    at = quoted(w, pattern)
    ask = w.pick(
        f"Find the file that mentions {at} and tell me its {key}",
        f"What is the {key} in the file that contains {at}?",
        f"Search for {at} and read the {key} from that file",
        f"Which {key} does the file with {at} have?",
        f"Look for {at} and tell me the {key} in that file",
    )
    r.user(phrase(w, ask))
    line = f"{w.pick('', '# ', '// ')}{pattern}"
    lines = w.settings(pairs)
    place = w.rng.randint(0, len(lines))
    lines.insert(place, line)
    r.call(("search", {"pattern": pattern}, f"{path}:{place + 1}: {line}\n"))
    r.call(read(path, shown(lines)))
    r.answer(f"The {key} in {path} is {value}.")


def follow_files(w, r):
    """From file to file until one has the answer."""
    paths = w.paths(w.upto(2, 10))
    link, key, value = w.pick("next", "next", "see", "continue", "go to"), w.rng.choice(KEYS), w.value()
    at = quoted(w, paths[0])
    ask = w.pick(
        f"Start at {at} and follow the files to the end. What is the {key}?",
        f"Follow the chain that begins in {at} and tell me the {key} at its end",
        f"Read {at}, then the file that it names, and so on. What {key} stands in the last one?",
        f"{at} leads from file to file. Which {key} is at the end?",
    )
    r.user(phrase(w, ask))
    for path, after in zip(paths, paths[1:] + [None]):
        line = f"{link}: {after}" if after else f"{key}: {value}"
        around = [w.line() for _ in range(w.rng.choice((0, 0, 0, 1)))]
        lines = around + [line]
        r.call(read(path, shown(lines)))
    r.answer(f"The {key} in {paths[-1]} is {value}.")


def write_text(w, r):
    path = w.path()
    content = w.pick(w.sentence(), w.value(), w.word() + " " + w.word(), w.code().strip())
    content = content.replace('"', "").replace("\\", "").strip()
    at = quoted(w, path)
    ask = w.pick(
        f'Write "{content}" to {at}',
        f"Write `{content}` to {at}",
        f'Create {at} with the text "{content}"',
        f'Save "{content}" in {at}',
        f'Put "{content}" into {at}',
        f'Make a file {at} that says "{content}"',
        f'Create the file {at} with "{content}"',
    )
    r.user(ask if w.chance(0.6) else ask + w.pick(".", " please"))
    verb = w.pick("created", "created", "replaced")
    r.call(("write_file", {"path": path, "content": content}, f"{verb} {path} ({len(content)} bytes)\n"))
    r.answer(f"I wrote {path}.")


def copy_value(w, r):
    path, target = w.paths(2)
    pairs = w.pairs(1, 6)
    key, value = w.rng.choice(pairs)
    a, b = quoted(w, path), quoted(w, target)
    ask = w.pick(
        f"Copy the {key} from {a} to {b}",
        f"Read the {key} in {a} and write it to {b}",
        f"Write the {key} of {a} into {b}",
        f"Take the {key} from {a} and save it in {b}",
    )
    r.user(phrase(w, ask))
    r.call(read(path, shown(w.settings(pairs))))
    wrote = f"created {target} ({len(value)} bytes)\n"
    r.call(("write_file", {"path": target, "content": value}, wrote), said=f"The {key} in {path} is {value}.")
    r.answer(f"I wrote {target}.")


def run_command(w, r):
    command = w.pick(
        f"{w.pick('cargo', 'make', 'npm', 'go')} {w.pick('test', 'build', 'run', 'check')}",
        f"python {w.path('py')}",
        f"./{w.stem()}.sh {w.word()}",
        f"echo {w.word()} {w.word()}",
        f"git {w.pick('status', 'log', 'diff', 'branch')}",
        f"{w.word()} --{w.word()} {w.number()}",
        f"wc -l {w.path()}",
        "date",
        "ls",
        "pwd",
    )
    ask = w.pick(
        f"Run `{command}`",
        f"Run {command}",
        f"Execute `{command}`",
        f'Run the command "{command}"',
        f"What does `{command}` print?",
        f"Run `{command}` and tell me what it says",
        f"Start `{command}`",
    )
    r.user(phrase(w, ask) if "`" in ask or '"' in ask else ask)
    status = w.pick(0, 0, 0, 1, 2, 101, 127)
    lines = w.text(1, 5) if w.chance(0.8) else []
    r.call(("run_command", {"command": command}, f"exit status {status}\n" + "".join(line + "\n" for line in lines)))
    said = f" It printed: {lines[0].strip()}" if lines else " It printed nothing."
    r.answer(f"`{command}` ended with exit status {status}.{said}")


def find_in_folder(w, r):
    """The one file of a kind in a folder, and a value in it or how it begins."""
    extension, kind = w.rng.choice(KINDS)
    folder = "." if w.chance(0.5) else w.folder()
    name = w.file(extension)
    names = [n for n in w.entries(0, 8) if not n.endswith("." + extension)] + [name]
    path = name if folder == "." else f"{folder}/{name}"
    place = "" if folder == "." else f" in {quoted(w, folder)}"
    if w.chance(0.6):
        pairs = w.pairs(1, 6)
        key, value = w.rng.choice(pairs)
        ask = w.pick(
            f"What is the {key} in the {kind}{place}?",
            f"Find the {kind}{place} and tell me the {key}",
            f"Which {key} does the {kind}{place} have?",
            f"Look into the {kind}{place} and tell me the {key}",
        )
        lines, answer = w.settings(pairs), f"The {key} in {path} is {value}."
    else:
        lines = w.text()
        ask = w.pick(
            f"What does the {kind}{place} say?",
            f"Read the {kind}{place}",
            f"Show me the {kind}{place}",
            f"How does the {kind}{place} begin?",
        )
        answer = begins(path, lines)
    r.user(phrase(w, ask))
    r.call(("list_dir", {"path": folder}, w.listing(names)))
    r.call(read(path, shown(lines)))
    r.answer(answer)


KINDS = (
    ("toml", "toml file"), ("json", "json file"), ("md", "markdown file"), ("py", "python file"),
    ("yaml", "yaml file"), ("csv", "csv file"), ("rs", "rust file"), ("log", "log file"), ("txt", "text file"),
)
MANIFESTS = ("Cargo.toml", "package.json", "pyproject.toml")
READMES = ("README.md", "README", "README.txt", "readme.md", "Readme.md")


def what_is_this(w, r):
    """A look at the folder, and at its readme where there is one."""
    ask = w.pick(
        "What is this project?",
        "What is this folder about?",
        "What is this repository?",
        "Tell me about this project",
        "Summarize this project",
        "Summarize this folder",
        "Give me an overview of this folder",
        "What does this project do?",
        "Explain this project",
        "Describe this repository",
        "What does the readme say?",
        "Read the readme",
        "Have a look at the project and tell me what it is",
        "What am I looking at?",
    )
    r.user(phrase(w, ask))
    readme = w.rng.choice(READMES) if w.chance(0.8) else None
    also = [name for name in (readme, w.rng.choice(MANIFESTS) if w.chance(0.5) else None) if name]
    names = [n for n in w.entries(1, 16, *also) if n in also or n not in READMES]
    r.call(("list_dir", {"path": "."}, w.listing(names)))
    if readme is None:
        r.answer(f"This folder has:\n{listed(names)}")
        return
    lines = w.readme() if w.chance(0.8) else w.text()
    more = w.rng.randint(1, 400) if w.chance(0.3) else 0
    r.call(read(readme, shown(lines, more)))
    r.answer(begins(readme, lines))


def project_value(w, r):
    """A value of the project: of the file that tells it, which the folder's listing shows."""
    manifest = w.rng.choice(MANIFESTS)
    key = w.pick("version", "version", "name", "license", "author", "description", "edition", "language")
    pairs = [(name, w.value_of(name)) for name in w.keys(w.upto(1, 6)) if name != key]
    value = w.version() if key == "version" else w.value_of(key)
    pairs.insert(w.rng.randint(0, len(pairs)), (key, value))
    of = w.pick("this project", "the project", "this repository", "this package")
    ask = w.pick(
        f"What is the {key} of {of}?",
        f"What's the {key} of {of}?",
        f"Which {key} does {of} have?",
        f"Tell me the {key} of {of}",
        f"Find the {key} of {of}",
    )
    r.user(phrase(w, ask))
    names = [n for n in w.entries(1, 14, manifest) if n == manifest or n not in MANIFESTS]
    r.call(("list_dir", {"path": "."}, w.listing(names)))
    r.call(read(manifest, shown(w.manifest(manifest, pairs))))
    r.answer(f"The {key} in {manifest} is {value}.")


FILE_TASKS = [
    # task, weight, the tools it needs
    (list_folder, 1.2, ["list_dir"]),
    (read_text, 1.2, ["read_file"]),
    (read_value, 1.6, ["read_file"]),
    (read_values, 1.5, ["read_file"]),
    (read_both, 0.7, ["read_file"]),
    (search_word, 1.5, ["search"]),
    (search_then_read, 0.8, ["search", "read_file"]),
    (follow_files, 1.4, ["read_file"]),
    (write_text, 0.9, ["write_file"]),
    (copy_value, 0.8, ["read_file", "write_file"]),
    (run_command, 0.7, ["run_command"]),
    (find_in_folder, 1.1, ["list_dir", "read_file"]),
    (what_is_this, 1.2, ["list_dir", "read_file"]),
    (project_value, 0.6, ["list_dir", "read_file"]),
]


def without_tool(w, r, task):
    """Asked for what the tools on offer cannot do."""
    asked = Rollout("")
    task(w, asked)
    r.family = "no_tool"
    r.messages.append(asked.messages[0])
    r.answer(NO_TOOL)
    return r


def files_rollout(w):
    tasks, weights = [t for t in FILE_TASKS], [weight for _, weight, _ in FILE_TASKS]
    count = 1 if w.chance(0.85) else 2
    chosen = w.rng.choices(tasks, weights, k=count)
    r = Rollout("+".join(task.__name__ for task, _, _ in chosen))
    need = {name for _, _, names in chosen for name in names}
    if w.chance(0.7):
        # As `hotloop agent` offers them.
        names = ["list_dir", "read_file", "search"]
        if "write_file" in need or w.chance(0.2):
            names.append("write_file")
        if "run_command" in need or w.chance(0.2):
            names.append("run_command")
    else:
        names = [name for name in FILE_TOOLS if name in need or w.chance(0.5)]
        w.rng.shuffle(names)
    r.tools = [FILE_TOOLS[name] for name in names]
    if w.chance(0.15):
        other = lookup_tool(w, w.rng.choice(NOUNS))
        r.tools.insert(w.rng.randint(0, len(r.tools)), other)
    if w.chance(0.35):
        r.messages.append({"role": "system", "content": w.pick(AGENT, AGENT, w.rng.choice(SYSTEMS))})
    if w.chance(0.05) and count == 1:
        r.tools = [t for t in r.tools if t["function"]["name"] not in need]
        return without_tool(w, r, chosen[0][0])
    for task, _, _ in chosen:
        task(w, r)
    return r


# Tasks on other tools: values that are looked up, set and sent.

NOUNS = (
    "price weight color owner status manager city phone email address age rating stock size speed height salary score "
    "balance capital author director genre language currency population temperature humidity birthday deadline budget "
    "distance duration category supplier teacher doctor captain partner neighbor leader mentor editor origin version "
    "license region branch room floor seat gate table order ticket invoice password title team department country"
).split()
# A person or a thing may have these, and they are again a person or a thing.
RELATIONS = (
    "manager owner author director teacher doctor captain partner neighbor leader mentor editor supplier parent friend "
    "boss assistant sister brother cousin deputy guardian tenant landlord sponsor trainer driver"
).split()
SUBJECTS = ("name", "name", "item", "person", "product", "key", "id", "of", "query")


def lookup_tool(w, noun):
    return tool(f"get_{noun}", f"Tells the {noun}.", **{w.rng.choice(SUBJECTS): "string"})


def parameter(definition):
    return next(iter(definition["function"]["parameters"]["properties"]))


def looked_up(w, definition, subject, noun, value):
    """A call of a lookup tool with its output, in one of several forms."""
    arguments = {parameter(definition): subject}
    form = w.rng.random()
    if form < 0.4:
        output = value
    elif form < 0.6:
        output = json.dumps({noun: value})
    elif form < 0.8:
        output = json.dumps({parameter(definition): subject, noun: value})
    elif form < 0.9:
        output = f"{noun}: {value}"
    else:
        pairs = [(key, w.value()) for key in w.rng.sample(NOUNS, 2) if key != noun] + [(noun, value)]
        w.rng.shuffle(pairs)
        output = json.dumps(dict(pairs))
    return (definition["function"]["name"], arguments, output)


def subject_of(w):
    return w.pick(w.person(), w.word(), w.word().capitalize(), w.identifier())


def offer(w, r, nouns, *more):
    """The tools for these nouns among others, in any order."""
    tools = {noun: lookup_tool(w, noun) for noun in nouns}
    taken = {definition["function"]["name"] for definition in tools.values()}
    others = []
    for noun in w.rng.sample(NOUNS, w.upto(0, 4)):
        definition = lookup_tool(w, noun)
        if noun not in tools and definition["function"]["name"] not in taken:
            others.append(definition)
    r.tools = list(tools.values()) + others + list(more)
    w.rng.shuffle(r.tools)
    if w.chance(0.3):
        r.messages.append({"role": "system", "content": w.rng.choice(SYSTEMS)})
    return tools


def asks_of(w, noun, subject):
    return w.pick(
        f"What is the {noun} of {subject}?",
        f"What's the {noun} of {subject}?",
        f"Tell me the {noun} of {subject}",
        f"Get the {noun} of {subject}",
        f"Find the {noun} of {subject}",
        f"Which {noun} does {subject} have?",
        f"I need the {noun} of {subject}",
        f"Look up the {noun} of {subject}",
        f"Do you know the {noun} of {subject}?",
        f"{noun} of {subject}?",
    )


def look_up(w, r):
    noun, subject, value = w.rng.choice(NOUNS), subject_of(w), w.value()
    tools = offer(w, r, [noun])
    r.user(phrase(w, asks_of(w, noun, quoted(w, subject))))
    if w.chance(0.08):
        name, arguments, _ = looked_up(w, tools[noun], subject, noun, value)
        why = w.pick("not found", "no such entry", "timed out", "access denied")
        r.call((name, arguments, f"error: {why}"))
        r.answer(f"I could not get the {noun} of {subject}: {why}.")
        return
    r.call(looked_up(w, tools[noun], subject, noun, value))
    r.answer(f"The {noun} of {subject} is {value}.")


def look_up_at_once(w, r, ask, tools, facts):
    """Calls for all of these facts, `(subject, noun, value)`, and the answer that tells them."""
    r.user(phrase(w, ask))
    r.call(
        *(looked_up(w, tools[noun], subject, noun, value) for subject, noun, value in facts),
        shuffled=w.rng if w.chance(0.3) else None,
    )
    r.answer("\n".join(f"The {noun} of {subject} is {value}." for subject, noun, value in facts))


def look_up_several(w, r):
    """One thing of several subjects, at once."""
    noun = w.rng.choice(NOUNS)
    subjects = w.values(w.rng.choice((2, 2, 3, 3, 4, 5)), lambda: subject_of(w))
    values = w.values(len(subjects))
    tools = offer(w, r, [noun])
    names = joined(subjects)
    ask = w.pick(
        f"What is the {noun} of {names}?",
        f"Get the {noun} of {names}",
        f"Compare the {noun} of {names}",
        f"Tell me the {noun} of {names}",
        f"I need the {noun} of {names}",
        f"Look up the {noun} of {names}",
    )
    look_up_at_once(w, r, ask, tools, [(subject, noun, value) for subject, value in zip(subjects, values)])


def look_up_two(w, r):
    """Two things of one subject, with two tools at once."""
    nouns = w.rng.sample(NOUNS, 2)
    subject, values = subject_of(w), w.values(2)
    tools = offer(w, r, nouns)
    a, b = nouns
    ask = w.pick(
        f"What are the {a} and the {b} of {subject}?",
        f"Tell me the {a} and the {b} of {subject}",
        f"Get the {a} and {b} of {subject}",
        f"I need the {a} and the {b} of {subject}",
    )
    look_up_at_once(w, r, ask, tools, [(subject, noun, value) for noun, value in zip(nouns, values)])


def look_up_chain(w, r):
    """The owner of somebody, then that one's manager, then that one's city: each output is the next argument."""
    relations = w.rng.sample(RELATIONS, w.rng.choice((1, 1, 2, 2, 3)))
    noun = w.rng.choice([n for n in NOUNS if n not in relations])
    steps = relations + [noun]
    tools = offer(w, r, steps)
    subject = w.person()
    then = ", then ".join(f"the {step} of that {w.pick('person', 'one')}" for step in steps[1:])
    ask = w.pick(
        f"Get the {steps[0]} of {subject}, then {then}",
        f"Find the {steps[0]} of {subject}, then {then}",
        f"What is the {steps[0]} of {subject}, then {then}?",
        f"Look up the {steps[0]} of {subject}, then {then}",
        f"I need the {steps[0]} of {subject}, then {then}",
    )
    r.user(phrase(w, ask))
    at = subject
    for step in steps:
        value = w.value() if step == noun else w.person()
        r.call(looked_up(w, tools[step], at, step, value))
        at, last = value, at
    r.answer(f"The {noun} of {last} is {at}.")


def follow_links(w, r):
    """From node to node with one tool until there is no next."""
    noun = w.pick("next", "parent", "successor", "child", "follower")
    what = w.pick("node", "stop", "station", "page", "room", "ticket")
    definition = tool(f"get_{noun}", f"Tells the {noun}.", **{what: "string"})
    offer(w, r, [], definition)
    nodes = w.values(w.upto(2, 11), lambda: w.pick(w.word(), w.word().capitalize(), w.identifier()))
    ask = w.pick(
        f"Start at {nodes[0]} and follow {noun} to the end. Where do you arrive?",
        f"Follow the {noun} of {nodes[0]} until there is none. Which {what} is the last?",
        f"Go from {nodes[0]} to the {noun} {what} again and again. Where does it end?",
    )
    r.user(phrase(w, ask))
    end = w.pick("none", "end", "null", "nothing")
    for node, after in zip(nodes, nodes[1:] + [end]):
        r.call((definition["function"]["name"], {what: node}, after))
    r.answer(f"The last {what} is {nodes[-1]}.")


def set_value(w, r):
    noun, subject, value = w.rng.choice(NOUNS), subject_of(w), w.value()
    key = w.rng.choice(SUBJECTS)
    definition = tool(f"set_{noun}", f"Changes the {noun}.", **{key: "string", "value": "string"})
    offer(w, r, [noun] if w.chance(0.4) else [], definition)
    ask = w.pick(
        f"Set the {noun} of {subject} to {value}",
        f"Change the {noun} of {subject} to {value}",
        f"Make {value} the {noun} of {subject}",
        f"Update the {noun} of {subject} to {value}",
    )
    r.user(ask if w.chance(0.7) else w.pick("please ", "now ") + ask[0].lower() + ask[1:])
    r.call((definition["function"]["name"], {key: subject, "value": value}, w.pick("ok", "done", '{"ok": true}', "updated")))
    r.answer(f"The {noun} of {subject} is now {value}.")


def send_text(w, r):
    who, text = w.person(), w.sentence().rstrip(".!")
    definition = tool(
        w.pick("send_message", "send_email", "post_message", "notify", "send"),
        "Sends a text.",
        **{w.pick("to", "recipient", "user", "channel"): "string", w.pick("text", "body", "message", "content"): "string"},
    )
    to, body = definition["function"]["parameters"]["properties"]
    offer(w, r, [], definition)
    ask = w.pick(
        f'Send "{text}" to {who}',
        f'Tell {who} "{text}"',
        f'Write {who} a message that says "{text}"',
        f'Send {who} the message "{text}"',
    )
    r.user(ask)
    r.call((definition["function"]["name"], {to: who, body: text}, w.pick("ok", "sent", '{"status": "sent"}')))
    r.answer(f"I sent it to {who}.")


def look_up_and_send(w, r):
    noun, subject, value, who = w.rng.choice(NOUNS), subject_of(w), w.value(), w.person()
    definition = tool("send_message", "Sends a text.", to="string", text="string")
    tools = offer(w, r, [noun], definition)
    ask = w.pick(
        f"Send the {noun} of {subject} to {who}",
        f"Tell {who} the {noun} of {subject}",
        f"Look up the {noun} of {subject} and send it to {who}",
    )
    r.user(phrase(w, ask))
    r.call(looked_up(w, tools[noun], subject, noun, value))
    sent = w.pick("ok", "sent")
    r.call(("send_message", {"to": who, "text": value}, sent), said=f"The {noun} of {subject} is {value}.")
    r.answer(f"I sent it to {who}.")


LOOKUP_TASKS = [
    (look_up, 1.2),
    (look_up_several, 1.3),
    (look_up_two, 0.7),
    (look_up_chain, 1.5),
    (follow_links, 1.2),
    (set_value, 0.7),
    (send_text, 0.6),
    (look_up_and_send, 0.6),
]


def lookup_rollout(w):
    task = w.rng.choices([t for t, _ in LOOKUP_TASKS], [weight for _, weight in LOOKUP_TASKS])[0]
    r = Rollout(task.__name__)
    task(w, r)
    return r


# Talk without tools.

GREETINGS = "hello|hi|hey|good morning|hello there|hi!|Hello!|good evening|hey there|Hello, how are you?|yo".split("|")
WHO = (
    "who are you?|what are you?|what is your name?|what can you do?|help|what model is this?|how big are you?|"
    "which model are you?|what do you know?|are you a large language model?|introduce yourself|what are you good at?|"
    "how can you help me?|how many parameters do you have?"
).split("|")
THANKS = "thanks|thank you|thank you!|thanks a lot|great, thanks|ok thanks|perfect, thank you".split("|")


def beyond(w):
    x, y, path = w.word(), w.word(), w.path()
    topic = w.pick(x, "the sea", "quantum physics", "the French revolution", "love", "compilers", "black holes", "history")
    return w.pick(
        f"Write a poem about {topic}",
        f"Explain {topic} to me",
        f"Tell me a joke about {topic}",
        f"Refactor {path} to use {x}",
        f"Refactor the {x} module",
        f"Fix the bug in {path}",
        "Fix the failing tests",
        "Why does the build fail?",
        f"Translate {x} into French",
        f"What is {w.rng.randint(2, 99)} times {w.rng.randint(2, 99)}?",
        f"What is {w.rng.randint(2, 99)} + {w.rng.randint(2, 99)}?",
        f"Who invented {x}?",
        "What is the capital of France?",
        "Who is the president of the United States?",
        f"Implement a {x} in Rust",
        f"Write a function that sorts {x}",
        f"Write unit tests for {path}",
        f"Add a feature that {x}s the {y}",
        f"Make the {x} faster",
        f"Should I use {x} or {y}?",
        f"What do you think about {topic}?",
        f"How do I {x} a {y}?",
        f"Why is {x} slow?",
        f"Design a database for {x}",
        "Review my code",
        f"Optimize {path}",
        f"Convert {path} to TypeScript",
        f"Is {x} better than {y}?",
        "What is the meaning of life?",
        "What is the weather today?",
        "Tell me a story",
        "Sing a song",
        f"How does {topic} work?",
        f"Debug the {x} crash",
        f"Rename the function {x} to {y}",
        f"Plan a trip to {x.capitalize()}",
    )


def talk_rollout(w):
    r = Rollout("talk")
    kind = w.rng.random()
    if w.chance(0.6):
        r.tools = [FILE_TOOLS[name] for name in ["list_dir", "read_file", "search"] + w.rng.choice(([], ["write_file"], ["run_command"], ["write_file", "run_command"]))]
    if w.chance(0.35):
        r.messages.append({"role": "system", "content": w.pick(AGENT, AGENT, w.rng.choice(SYSTEMS))})
    if kind < 0.25:
        r.user(w.rng.choice(GREETINGS))
        r.answer("Hello! " + IDENTITY)
    elif kind < 0.5:
        ask = w.rng.choice(WHO)
        r.user(ask if w.chance(0.5) else ask[0].upper() + ask[1:])
        r.answer(IDENTITY)
    elif kind < 0.6:
        r.user(w.rng.choice(THANKS))
        r.answer("You are welcome.")
    elif kind < 0.65 and not r.tools:
        return without_tool(w, r, w.rng.choice(FILE_TASKS)[0])
    else:
        r.user(phrase(w, beyond(w)))
        r.answer(BEYOND)
    return r


def rollout(rng, split, size=1.0, **names):
    """One rollout. `size` from 0 to 1: how much stands in files and folders, and how long chains are."""
    w = World(rng, split, size, **names)
    kind = rng.random()
    if kind < 0.57:
        return files_rollout(w)
    if kind < 0.94:
        return lookup_rollout(w)
    return talk_rollout(w)


def copying(rng, split, **names):
    """Names and values that are said again: what a model must learn before all else."""
    w = World(rng, split, **names)
    pairs = [(w.pick(w.word(), w.path(), w.identifier()), w.value()) for _ in range(rng.randint(2, 8))]
    r = Rollout("copying")
    r.user("\n".join(f"{key}: {value}" for key, value in pairs))
    order = pairs[:]
    if w.chance(0.5):
        rng.shuffle(order)
    r.answer("\n".join(f"{key}: {value}" for key, value in order))
    return r


def recalling(rng, split, **names):
    """Many values asked for at once, of files in the task, of files that are read or of what is looked up: what a
    model must learn after copying."""
    w = World(rng, split, **names)
    r = Rollout("recalling")
    if w.chance(0.35):
        noun = w.rng.choice(NOUNS)
        tools = offer(w, r, [noun])
        subjects = w.values(rng.randint(3, 7), lambda: subject_of(w))
        values = w.values(len(subjects))
        r.user(f"What is the {noun} of {joined(subjects)}?")
        r.call(*(looked_up(w, tools[noun], *about) for about in zip(subjects, [noun] * len(subjects), values)), shuffled=rng)
        order = list(zip(subjects, values))
        rng.shuffle(order)
        r.answer("\n".join(f"The {noun} of {subject} is {value}." for subject, value in order))
        return r
    paths = w.paths(rng.choice((1, 2, 2, 3)))
    files = [(path, w.pairs(3, 8)) for path in paths]
    known = [(key, path, value) for path, pairs in files for key, value in pairs]
    asked = rng.sample(known, min(len(known), rng.randint(3, 8)))
    if w.chance(0.4):
        path, pairs = rng.choice(files)
        asked[rng.randrange(len(asked))] = (rng.choice([key for key in KEYS if key not in dict(pairs)]), path, None)
    questions = joined(f"the {key} in {path}" for key, path, _ in asked)
    if w.chance(0.5):
        r.tools = [FILE_TOOLS["read_file"]]
        r.user(f"Read {joined(paths)} and tell me {questions}")
        r.call(*(read(path, shown(w.settings(pairs))) for path, pairs in files), shuffled=rng)
    else:
        lines = [line for path, pairs in files for line in [path] + w.settings(pairs) + [""]]
        r.user("\n".join(lines) + f"\nTell me {questions}")
    r.answer(
        "\n".join(
            f"{path} has no {key}." if value is None else f"The {key} in {path} is {value}."
            for key, path, value in asked
        )
    )
    return r


def finding(rng, split, **names):
    """Files of several kinds in a folder, told apart by how their names end."""
    w = World(rng, split, **names)
    r = Rollout("finding")
    kinds = rng.sample(KINDS, rng.randint(2, 5))
    endings = tuple("." + extension for extension, _ in kinds)
    wanted = [(kind, w.file(extension)) for extension, kind in kinds]
    names = [name for name in w.entries(0, 7) if not name.endswith(endings)] + [name for _, name in wanted]
    listing = w.listing(names)
    asked = joined(f"the {kind}" for kind, _ in wanted)
    if w.chance(0.35):
        r.user(f"{listing}\nWhich are {asked}?")
        r.answer("\n".join(f"The {kind} is {name}." for kind, name in wanted))
        return r
    folder = "." if w.chance(0.5) else w.folder()
    r.tools = [FILE_TOOLS["list_dir"], FILE_TOOLS["read_file"]]
    r.user(f"Read {asked}" + ("" if folder == "." else f" in {folder}"))
    r.call(("list_dir", {"path": folder}, listing))
    paths = [name if folder == "." else f"{folder}/{name}" for _, name in wanted]
    texts = [[w.line().strip() or "-"] for _ in paths]
    r.call(*(read(path, shown(lines)) for path, lines in zip(paths, texts)))
    r.answer("\n".join(begins(path, lines) for path, lines in zip(paths, texts)))
    return r


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--split", choices=("train", "heldout"), default="train")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--count", type=int, default=5)
    options = arguments.parse_args()
    rng = random.Random(options.seed)
    for _ in range(options.count):
        made = rollout(rng, options.split)
        print(json.dumps({"family": made.family, "tools": made.tools, "messages": made.messages}, ensure_ascii=False))


if __name__ == "__main__":
    main()
