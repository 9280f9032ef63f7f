//! Results: a table on the terminal, a JSON file, and plots.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use plotters::prelude::*;
use serde_json::{Value, json};

/// Rows of one benchmark.
pub struct Report {
    name: &'static str,
    rows: Vec<Value>,
}

impl Report {
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            rows: Vec::new(),
        }
    }

    pub fn push(&mut self, row: Value) {
        self.rows.push(row);
    }

    pub fn rows(&self) -> &[Value] {
        &self.rows
    }

    /// Writes `target/bench/<name>.json`.
    pub fn write(&self) {
        let report = json!({ "machine": machine(), "commit": commit(), "rows": self.rows });
        let path = out().join(format!("{}.json", self.name));
        fs::write(&path, serde_json::to_string_pretty(&report).unwrap() + "\n").unwrap();
        println!("\nwrote {}", path.display());
    }
}

/// The points of the rows that have these values, from one column to another.
pub fn points(rows: &[Value], with: &[(&str, Value)], x: &str, y: &str) -> Vec<(f64, f64)> {
    let fits = |row: &&Value| with.iter().all(|(key, value)| row[*key] == *value);
    let point = |row: &Value| Some((row[x].as_f64()?, row[y].as_f64()?));
    rows.iter().filter(fits).filter_map(point).collect()
}

/// Where results go.
pub fn out() -> PathBuf {
    let out = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    fs::create_dir_all(&out).unwrap();
    out
}

/// Adds p50, p90, p99 in microseconds, and how many there were, to the parameters of a row.
pub fn row(mut parameters: Value, times: &mut [Duration]) -> Value {
    for percent in [50, 90, 99] {
        let time = percentile(times, percent).as_secs_f64() * 1e6;
        parameters[format!("p{percent}_us")] = json!((time * 10.0).round() / 10.0);
    }
    parameters["n"] = json!(times.len());
    parameters
}

pub fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

/// The processor time that a process has used, where the system tells.
pub fn cpu_time(process: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let stat = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

pub fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{name}, {cores} cores")
}

pub fn commit() -> String {
    let git = Command::new("git").args(["rev-parse", "HEAD"]).output();
    git.map_or_else(
        |_| "unknown".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}

/// A plot of lines over logarithmic axes.
pub struct Plot<'a> {
    pub file: &'a str,
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    /// A name and its points.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl Plot<'_> {
    /// Writes `target/bench/<file>.svg`.
    pub fn write(&self) {
        let path = out().join(format!("{}.svg", self.file));
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        if points().next().is_none() {
            return;
        }
        let range = |of: fn(&(f64, f64)) -> f64| {
            let low = points().map(of).fold(f64::INFINITY, f64::min);
            let high = points().map(of).fold(0.0, f64::max);
            (low / 1.5)..(high * 1.5)
        };
        let area = SVGBackend::new(&path, (820, 460)).into_drawing_area();
        area.fill(&WHITE).unwrap();
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(70)
            .build_cartesian_2d(range(|it| it.0).log_scale(), range(|it| it.1).log_scale())
            .unwrap();
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .draw()
            .unwrap();
        for (index, (name, points)) in self.lines.iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            chart
                .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)).point_size(3))
                .unwrap()
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()
            .unwrap();
        area.present().unwrap();
        drop(chart);
        println!("wrote {}", path.display());
    }
}

fn short(value: f64) -> String {
    match value {
        _ if value >= 1e6 => format!("{}M", (value / 1e5).round() / 10.0),
        _ if value >= 1e3 => format!("{}k", (value / 1e2).round() / 10.0),
        _ => format!("{}", (value * 10.0).round() / 10.0),
    }
}
