//! Imports point down only, as src/lib.rs promises, and the levels that are kept pure are pure.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use regex::Regex;

/// The level of each module, read from the comments of src/lib.rs.
fn levels() -> BTreeMap<String, u32> {
    let level = Regex::new(r"^// Level (\d)").unwrap();
    let module = Regex::new(r"^pub mod (\w+);").unwrap();
    let mut levels = BTreeMap::new();
    let mut current = None;
    for line in fs::read_to_string(root().join("lib.rs")).unwrap().lines() {
        if let Some(found) = level.captures(line) {
            current = Some(found[1].parse().unwrap());
        } else if let Some(found) = module.captures(line) {
            levels.insert(
                found[1].to_owned(),
                current.expect("a module stands under a level"),
            );
        }
    }
    levels
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The files of a module, without those that hold only tests.
fn files(module: &str) -> Vec<PathBuf> {
    let mut files = vec![root().join(format!("{module}.rs"))];
    let mut folders = vec![root().join(module)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") && !path.ends_with("tests.rs") {
                files.push(path);
            }
        }
    }
    files
}

/// The code of a file: without comments, and without its tests, which stand at the end.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    Regex::new(r"//[^\n]*")
        .unwrap()
        .replace_all(code, "")
        .into_owned()
}

/// The modules of this crate that a piece of code names.
fn imports(code: &str) -> Vec<String> {
    let single = Regex::new(r"\bcrate::(\w+)").unwrap();
    let mut names: Vec<String> = single
        .captures_iter(code)
        .map(|found| found[1].to_owned())
        .collect();
    for (at, start) in code.match_indices("use crate::{") {
        let mut depth = 1;
        let mut name = String::new();
        for letter in code[at + start.len()..].chars() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => names.push(std::mem::take(&mut name)),
                _ if depth == 1 => name.push(letter),
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
        names.push(name);
    }
    let first = |name: String| {
        name.trim()
            .split("::")
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    names.into_iter().map(first).collect()
}

#[test]
fn imports_point_down() {
    let levels = levels();
    assert!(levels.len() > 20, "src/lib.rs was not understood");
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (module, level) in &levels {
        for file in files(module) {
            for import in imports(&code(&file)) {
                seen += usize::from(levels.contains_key(&import));
                if levels.get(&import).is_some_and(|other| other > level) {
                    wrong.push(format!("{} imports {import}", file.display()));
                }
            }
        }
    }
    assert!(seen > 50, "the imports were not understood");
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn the_inner_levels_know_neither_tasks_nor_the_wire() {
    let outside = Regex::new(r"\b(tokio|tokio_util|tonic|prost|hyper)::").unwrap();
    let wrong: Vec<String> = levels()
        .into_iter()
        .filter(|(_, level)| [0, 1, 3].contains(level))
        .flat_map(|(module, _)| files(&module))
        .filter(|file| outside.is_match(&code(file)))
        .map(|file| file.display().to_string())
        .collect();
    assert_eq!(wrong, Vec::<String>::new());
}

/// Of the inner levels two parts speak gRPC themselves, as clients: the engines and the classifiers that are reached so.
#[test]
fn only_the_edge_and_what_is_asked_know_protobuf_and_grpc() {
    let asked = [
        root().join("backend/gpu"),
        root().join("safety/classify/grpc"),
    ];
    let is_asked = |file: &PathBuf| {
        let mut parts = asked.iter();
        parts.any(|part| file.starts_with(part) || file.with_extension("") == *part)
    };
    let wire = Regex::new(r"\b(tonic|prost)::").unwrap();
    let wrong: Vec<String> = levels()
        .into_iter()
        .filter(|(_, level)| *level < 5)
        .flat_map(|(module, _)| files(&module))
        .filter(|file| !is_asked(file))
        .filter(|file| wire.is_match(&code(file)))
        .map(|file| file.display().to_string())
        .collect();
    assert_eq!(wrong, Vec::<String>::new());
}
