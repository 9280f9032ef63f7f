//! What keeping keys and values is worth, and how fast the engine in this process decodes.
//!
//! The model is a Llama of random weights in the shape of the built-in one, or any directory with
//! `--model`. The two ways to the first token, with the history's keys and values kept and with
//! nothing kept, take turns, so that what else the machine does hits both. A model of this size computes on one thread; the processor
//! time beside the time that passed tells how much of it the machine gave to others.
//!
//! Prints a table, and writes it to `target/bench/prefix_cache.json`.

#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot run says so by panicking"
)]

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Parser;
use futures::{StreamExt as _, executor::block_on, stream::select_all};
use hotloop::{
    backend::{
        Backend as _, DeviceChoice, Prompt, Sampling,
        local::{Local, LocalOptions, set_thread_count},
    },
    item::ResponseId,
    ledger::{Draft, Rope},
};
use serde_json::{Value, json};

mod support;
#[path = "../tests/support/tiny_llama.rs"]
mod tiny_llama;

use support::report::{Plot, Report, cpu_time, percentile, points, row};
use tiny_llama::{Family, Size, TinyLlama};

const VOCAB: u32 = 1024;
const SIZE: Size = Size {
    hidden: 160,
    inner: 432,
    layers: 6,
    heads: 5,
    kv_heads: 5,
};

const FIRST_TOKENS: u32 = 5;

/// How often the kept history must be faster, at the least.
const RATIO_MIN: f64 = 10.0;

#[derive(Parser)]
struct Options {
    /// A model's directory, in place of random weights.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Computes on the CPU also where the program was built for an accelerator and has one.
    #[arg(long)]
    cpu: bool,
    /// How many samples decode at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8])]
    batches: Vec<u32>,
    /// Tokens that each of them has before it.
    #[arg(long, default_value_t = 512)]
    decode_prompt_tokens: u32,
    /// Tokens that each of them samples.
    #[arg(long, default_value_t = 400)]
    decode_tokens: u32,
    /// Tokens before the first token's new ones.
    #[arg(long, default_value_t = 8192)]
    history_tokens: u32,
    /// New tokens before the first token.
    #[arg(long, default_value_t = 200)]
    new_tokens: u32,
    /// Tokens of a block of keys and values. The engine's default where it is not given.
    #[arg(long)]
    block_tokens: Option<usize>,
    /// Tokens of a prompt that are computed between two decoding steps. Likewise.
    #[arg(long)]
    prefill_tokens: Option<usize>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    #[allow(unsafe_code, reason = "nothing else runs yet")]
    // SAFETY: there is no other thread yet.
    unsafe {
        set_thread_count();
    }
    let options = Options::parse();
    let dir = tempfile::tempdir().unwrap();
    if options.model.is_none() {
        let model = TinyLlama {
            size: SIZE,
            context_length: 16_384,
            ..TinyLlama::new(Family::Llama, VOCAB as usize)
        };
        model.write(dir.path());
    }
    let mut how = LocalOptions::new("bench".into());
    how.cache_bytes_max = 8 << 30;
    how.jobs_max = how
        .jobs_max
        .max(*options.batches.iter().max().unwrap() as usize);
    how.block_tokens = options.block_tokens;
    how.prefill_tokens_max = options.prefill_tokens;
    if options.cpu {
        how.device = DeviceChoice::Cpu;
    }
    let model = options.model.as_deref().unwrap_or(dir.path());
    let local = Local::load(model, how).unwrap();
    println!("{} parameters", local.parameters());

    let mut rows = Vec::new();
    for batch in &options.batches {
        rows.push(decode(&local, *batch, &options));
    }
    rows.extend(first_token(&local, &options));
    let mut report = Report::new("prefix_cache");
    rows.into_iter().for_each(|row| report.push(row));
    report.write();
    let with = [("measure", json!("decode"))];
    let line = points(report.rows(), &with, "batch", "tokens_per_second");
    Plot {
        file: "prefix_cache",
        title: "Decoding in this process",
        x: "samples at once",
        y: "tokens a second",
        lines: vec![("all together".to_owned(), line)],
    }
    .write();
}

/// Time to the first token behind a history whose keys and values are kept, and behind one that
/// is computed anew.
fn first_token(local: &Local, options: &Options) -> Vec<Value> {
    let (history_tokens, new_tokens) = (options.history_tokens, options.new_tokens);
    let history = rope(&Rope::default(), history_tokens, 0);
    block_on(local.prefill(prompt("kept", &history, 1))).unwrap();
    let (mut kept, mut anew) = ((Vec::new(), 0.0), (Vec::new(), 0.0));
    for trial in 1..=FIRST_TOKENS {
        let tokens = rope(&history, new_tokens, trial);
        // A tenant that nothing is kept for.
        let stranger = format!("stranger-{trial}");
        for (tenant, (times, cpus)) in [("kept", &mut kept), (&stranger, &mut anew)] {
            let (start, cpu) = (Instant::now(), cpu_time(std::process::id()).as_secs_f64());
            let mut answer = local.sample(prompt(tenant, &tokens, 1));
            let chunk = block_on(answer.next()).unwrap().unwrap();
            times.push(start.elapsed());
            *cpus += cpu_time(std::process::id()).as_secs_f64() - cpu;
            let cached = chunk.cached_tokens.unwrap();
            assert_eq!(cached, if tenant == "kept" { history_tokens } else { 0 });
        }
    }
    let ratio =
        percentile(&mut anew.0, 50).as_secs_f64() / percentile(&mut kept.0, 50).as_secs_f64();
    println!("\nfirst token, {history_tokens} tokens of history and {new_tokens} new ones");
    let rows = [("kept", kept), ("anew", anew)].map(|(path, (mut times, cpu))| {
        let row = row(
            json!({
                "measure": "first_token",
                "path": path,
                "history_tokens": history_tokens,
                "new_tokens": new_tokens,
                "cpu_us": (cpu * 1e6 / f64::from(FIRST_TOKENS)).round(),
            }),
            &mut times,
        );
        println!(
            "  {path:<6} {} µs of cpu, {}",
            row["cpu_us"],
            times_of(&row)
        );
        row
    });
    println!("  ratio  {ratio:.1}, at least {RATIO_MIN:.0} is asked for");
    let ratio = json!({
        "measure": "first_token_ratio",
        "history_tokens": history_tokens,
        "new_tokens": new_tokens,
        "ratio": ratio,
        "ratio_min": RATIO_MIN,
    });
    rows.into_iter().chain([ratio]).collect()
}

/// Tokens a second of so many samples at once, while all of them sample.
fn decode(local: &Local, batch: u32, options: &Options) -> Value {
    let (prompt_tokens, decode_tokens) = (options.decode_prompt_tokens, options.decode_tokens);
    let answers = (0..batch).map(|number| {
        let tokens = rope(&Rope::default(), prompt_tokens, 1000 * batch + number);
        let answer = local.sample(prompt("decode", &tokens, decode_tokens));
        answer.map(move |chunk| (number as usize, chunk.unwrap().tokens.len()))
    });
    let mut times = vec![Vec::new(); batch as usize];
    let mut all = select_all(answers);
    let cpu = cpu_time(std::process::id()).as_secs_f64();
    block_on(async {
        while let Some((number, tokens)) = all.next().await {
            assert_eq!(tokens, 1);
            times[number].push(Instant::now());
        }
    });
    let cpu_us =
        (cpu_time(std::process::id()).as_secs_f64() - cpu) * 1e6 / f64::from(batch * decode_tokens);
    // From when the last one has begun until the first one has ended.
    let from = times.iter().map(|times| times[0]).max().unwrap();
    let to = times.iter().map(|times| *times.last().unwrap());
    let to = to.min().unwrap();
    let within = times.iter().flatten().filter(|at| (from..to).contains(at));
    let tokens_per_second = within.count() as f64 / (to - from).as_secs_f64();
    let mut gaps: Vec<Duration> = times
        .iter()
        .flat_map(|times| times.windows(2).map(|pair| pair[1] - pair[0]))
        .collect();
    let row = row(
        json!({
            "measure": "decode",
            "batch": batch,
            "history_tokens": prompt_tokens,
            "tokens_per_second": tokens_per_second.round(),
            // With its part of what the prompts took.
            "cpu_us_per_token": cpu_us.round(),
        }),
        &mut gaps,
    );
    if batch == options.batches[0] {
        println!("decode, {prompt_tokens} tokens of history and {decode_tokens} sampled");
    }
    println!(
        "  batch {batch}  {tokens_per_second:>7.0} tokens/s, {cpu_us:>5.0} µs of cpu, a token {}",
        times_of(&row)
    );
    row
}

fn prompt(tenant: &str, tokens: &Rope, max_tokens: u32) -> Prompt {
    Prompt {
        response_id: ResponseId::default(),
        tenant: tenant.into(),
        affinity: "bench".into(),
        tokens: tokens.clone(),
        recent: Vec::new(),
        chat: None,
        sampling: Sampling::greedy(max_tokens),
    }
}

/// Behind `from`, tokens that look random: other ones for each seed.
fn rope(from: &Rope, count: u32, seed: u32) -> Rope {
    let token = |at: u32| (at ^ seed.wrapping_mul(0x9E37_79B9)).wrapping_mul(0x85EB_CA6B) >> 22;
    from.with_rendered(Draft {
        ids: (0..count).map(token).collect(),
        ..Draft::default()
    })
}

fn times_of(row: &Value) -> String {
    let of = |key: &str| row[key].as_f64().unwrap() / 1e3;
    format!(
        "p50 {:>8.2} ms  p90 {:>8.2} ms  p99 {:>8.2} ms  n {}",
        of("p50_us"),
        of("p90_us"),
        of("p99_us"),
        row["n"]
    )
}
