//! `foreshard report` and `foreshard replay`, on runs that are made up here.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use foreshard::forecast::{Forecast, Method, Robust};
use foreshard::local::report::html;
use foreshard::plan::ShardId;
use foreshard::transition::*;
use foreshard::units::{Bytes, Seconds};
use serde_json::json;
use tempfile::TempDir;

/// A moment of a job on two workers whose steps were predicted to take 100 ms.
fn moment(step: u64, time: f64, step_time: f64, proposal: Option<Proposal>) -> Snapshot {
    let observed = |centre: f64| {
        let window =
            |n: u64| Window { span: Seconds(centre * n as f64), seen: Robust { centre, spread: 0.01 * centre, n } };
        Observed { windows: [9, 18, 36, 72, 144].map(window).into() }
    };
    let forecast = |start: f64| Forecast {
        method: Method::Mean,
        start: Seconds(start),
        interval: Seconds(2.0),
        level: 0.9,
        n_values: 40,
        mase: 0.8,
        known: (0.4, 0.6),
        doubt: 0.001,
        held: Default::default(),
        lower: vec![0.4; 30],
        mean: vec![0.5; 30],
        upper: vec![0.6; 30],
    };
    let worker = |rank: u32| Worker {
        rank,
        shard: ShardId(rank),
        predicted_busy: Seconds(0.09),
        busy: observed(step_time * 0.9),
        speed: 0.09 / step_time / 0.9,
        speed_forecast: Some(forecast(time)),
        memory: Memory { planned: Bytes(100), used: Bytes(100), limit: Bytes(1000), forecast: None },
        cpu: Watched { now: Some(0.75), forecast: Some(forecast(time)) },
        link: Link { per_step: Bytes(4096), bandwidth: Watched { now: Some(2e8), forecast: None } },
    };
    Snapshot {
        step,
        time: Seconds(time),
        steps_left: None,
        settings: Settings::default(),
        running: Running {
            revision: 1,
            since_step: 0,
            since: Seconds(0.0),
            predicted: Seconds(0.1),
            observed: observed(step_time),
            forecast: None,
        },
        workers: vec![worker(0), worker(1)],
        proposal,
        moves: Vec::new(),
        in_flight: None,
        considered: None,
        approved: None,
    }
}

/// Revision 2, which halves steps of 200 ms.
fn better(made: f64) -> Option<Proposal> {
    Some(Proposal::Plans(vec![Candidate {
        revision: 2,
        made: Seconds(made),
        interval: Seconds(0.0),
        running: vec![Seconds(0.2)],
        step_times: vec![Seconds(0.1)],
        memory: vec![Bytes(100), Bytes(100)],
        bytes_to_move: Bytes(4096),
        pause: Seconds(0.5),
        prepare: Seconds(3.0),
    }]))
}

/// All is well; steps slow down; the planner answers; the move is under way, and done.
fn story() -> Vec<Record> {
    let mut moving = moment(130, 23.0, 0.2, None);
    moving.in_flight = Some(2);
    let mut moved = moment(150, 26.0, 0.1, None);
    moved.running.revision = 2;
    moved.moves = vec![Move {
        revision: 2,
        step: 140,
        time: Seconds(25.0),
        pause: Measured { expected: Seconds(0.5), measured: Some(Seconds(0.25)) },
        prepare: Measured { expected: Seconds(3.0), measured: Some(Seconds(4.0)) },
        gain: Measured { expected: 0.5, measured: Some(0.375) },
    }];
    let moments =
        [moment(40, 4.0, 0.1, None), moment(110, 18.0, 0.2, None), moment(120, 20.0, 0.2, better(19.0)), moving, moved];
    moments.map(|snapshot| Record::new(snapshot.clone(), decide(&snapshot))).into()
}

fn lines(records: &[Record]) -> String {
    records.iter().map(|r| r.to_line().unwrap() + "\n").collect()
}

fn step(step: u64, revision: u64, incarnation: u32) -> String {
    let worker = |rank: u32| json!({"rank": rank, "worker": rank, "busy_s": 0.08, "predicted_busy_s": 0.09});
    let loss = 5.0 / (1.0 + step as f64);
    let line = json!({
        "step": step, "revision": revision, "incarnation": incarnation, "loss": loss, "seconds": 0.1, "predicted_s": 0.11,
        "workers": [worker(0), worker(1)],
    });
    format!("{line}\n")
}

/// A run of 160 steps with one move and one restart.
fn run() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    let log = (0..140).map(|s| step(s, 1, 0)).chain((140..156).map(|s| step(s, 2, 0)));
    write("log.jsonl", &log.chain((150..160).map(|s| step(s, 2, 1))).collect::<String>());
    let events = [
        json!({"event": "checkpoint", "seconds": 10.0, "step": 100, "revision": 1, "at": 100, "path": "x"}),
        json!({"event": "cutover", "seconds": 25.0, "step": 141, "revision": 2, "at": 140, "why": "worker 1 is slow <script>",
            "moved_bytes": 4096, "pause_seconds": 0.25, "prepare_seconds": 4.0, "predicted_step_seconds": 0.1}),
        json!({"event": "restart", "seconds": 31.0, "step": 150, "revision": 2, "why": "worker 0 was lost", "from": 150,
            "lost_steps": 6, "seconds_lost": 3.5, "incarnation": 1}),
        json!({"event": "recut called off", "seconds": 31.5, "step": 152, "revision": 2, "why": "no longer wanted"}),
    ];
    write("events.jsonl", &events.map(|e| format!("{e}\n")).concat());
    write("decisions.jsonl", &lines(&story()));
    fs::create_dir(directory.path().join("plans")).unwrap();
    write("plans/plan-1.svg", "<svg xmlns=\"http://www.w3.org/2000/svg\"><script>alert(1)</script></svg>");
    directory
}

/// Text as the page shows it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn report(run: &Path) -> String {
    let page = html(run).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    for wrong in ["NaN", "<script", "src=\"http", "href", "url("] {
        assert!(!page.contains(wrong), "{wrong} in the page");
    }
    page
}

#[test]
fn a_page_has_every_section_and_every_decision() {
    let run = run();
    let page = report(run.path());
    let sections = [
        "Loss",
        "Throughput",
        "Load, predicted",
        "Speed of each device",
        "Step time, CPU",
        "Moves",
        "Plans",
        "Decisions",
        "Incidents",
    ];
    for section in sections {
        assert!(page.contains(&format!("<h2>{section}")), "{section} is missing");
    }
    let labels: Vec<&str> = story().iter().map(|r| r.decision.label()).collect();
    assert_eq!(labels, ["keep/steady", "wait/unsolved", "adopt", "wait/in-flight", "keep/steady"]);
    for record in story() {
        let text = record.decision.to_string();
        let reason = text.trim_start_matches("keep: ").trim_start_matches("wait: ");
        assert!(page.contains(&escaped(reason)), "{text} is missing");
    }
    // Headline, moves, incidents, forecasts.
    for text in [
        ">160<",
        "6 steps taken again",
        "training stood still for 250.0 ms",
        "37.5 %",
        "50.0 %",
        "4.00 KiB",
        "no longer wanted",
        "worker 0 was lost",
        "worker 1 is slow &lt;script",
        "Revision 2, from step 140",
        "the mean from 40 values",
        "device of worker 1",
        "CPU of worker 1, cores",
        "link of worker 0, MB/s",
        "the last after step 100",
    ] {
        assert!(page.contains(text), "{text} is missing");
    }
    assert_eq!(
        page.matches("class=\"mark cutover\"").count() - 1,
        1 + 2 + 2 + 7,
        "the move is marked in every chart over time"
    );
    assert_eq!(page.matches("class=\"plan\"").count(), 1);
    for missing in [
        "summary.json: there is none",
        "job.yaml: there is none",
        "plans/plan-1.json: there is none",
        "plans/plan-2.svg",
    ] {
        assert!(page.contains(missing), "{missing} is not said to be missing");
    }
}

#[test]
fn a_damaged_run_still_has_a_page() {
    let run = run();
    let file = |name: &str| run.path().join(name);
    // Half a line at the end.
    let whole = fs::read(file("decisions.jsonl")).unwrap();
    fs::write(file("decisions.jsonl"), &whole[..whole.len() - 100]).unwrap();
    let page = report(run.path());
    assert!(page.contains("decisions.jsonl is cut short in line 5") && page.contains("the last good line is 4"));
    // Anything, anywhere.
    let log = fs::read_to_string(file("log.jsonl")).unwrap();
    let odd = "\u{0}\u{7}nonsense\n{}\n[1]\n{\"step\": 1e999}\n{\"step\": 18446744073709551615, \"loss\": null}\n\n{\"step\": 3}\n";
    fs::write(file("log.jsonl"), [b"\xff\xfe\n", odd.as_bytes(), log.as_bytes()].concat()).unwrap();
    fs::write(
        file("events.jsonl"),
        "{\"event\": \"cutover\"}\n{\"event\": \"restart\", \"seconds\": -1e300, \"incarnation\": 1}\n",
    )
    .unwrap();
    fs::write(file("summary.json"), "{\"ending\": ").unwrap();
    fs::write(file("job.yaml"), ": :").unwrap();
    fs::write(file("plans/plan-1.json"), "[]").unwrap();
    let page = report(run.path());
    for text in [
        "log.jsonl: 5 lines cannot be read, the first is line 1",
        "summary.json: cannot be read",
        "plan-1.json: cannot be read",
        "job.yaml: ",
    ] {
        assert!(page.contains(text), "{text} is missing");
    }
    // A forecast that is not whole could not be decided upon.
    let broken = String::from_utf8(whole).unwrap().replacen("\"upper\":[0.6,", "\"upper\":[", 1);
    fs::write(file("decisions.jsonl"), broken).unwrap();
    assert!(
        report(run.path()).contains("decisions.jsonl: line 1 cannot be read (the forecast for worker 0 is not whole)")
    );
    // Nothing at all.
    for name in ["decisions.jsonl", "events.jsonl", "summary.json", "job.yaml"] {
        fs::remove_file(file(name)).unwrap();
    }
    fs::write(file("log.jsonl"), "").unwrap();
    let page = report(run.path());
    assert!(page.contains("No step has been written down") && page.contains("decisions.jsonl: there is none"));
}

#[test]
fn many_steps_make_no_large_page() {
    let run = tempfile::tempdir().unwrap();
    let mut log = String::new();
    for i in 0..60_000u32 {
        let noise = f64::from(i.wrapping_mul(2_654_435_761) >> 16) / 65536.0;
        let _ = writeln!(
            log,
            "{{\"step\":{i},\"loss\":{noise:.3},\"seconds\":{:.3},\"predicted_s\":0.1,\"workers\":[{{\"rank\":0,\"busy_s\":{noise:.3}}}]}}",
            0.1 + 0.1 * noise
        );
    }
    fs::write(run.path().join("log.jsonl"), log).unwrap();
    let page = report(run.path());
    assert!(page.contains(">60,000<") && page.len() < 300_000, "{} bytes", page.len());
}

#[test]
fn a_directory_that_is_no_run_is_refused() {
    let empty = tempfile::tempdir().unwrap();
    let output = command("report", empty.path(), &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("is no run directory"), "{}", text(&output.stderr));
    assert_eq!(command("report", Path::new("/nowhere"), &[]).status.code(), Some(2));
    assert_eq!(command("replay", empty.path(), &[]).status.code(), Some(2));
}

#[test]
fn the_page_is_written_where_one_looks_for_it() {
    let run = run();
    assert!(command("report", run.path(), &[]).status.success());
    assert!(fs::read_to_string(run.path().join("report.html")).unwrap().contains("<h2>Decisions"));
    let other = run.path().join("other.html");
    assert!(command("report", run.path(), &["-o", other.to_str().unwrap()]).status.success() && other.exists());
}

#[test]
fn a_replay_repeats_every_decision_unless_settings_change() {
    let run = run();
    let replayed = |more: &[&str]| {
        let output = command("replay", run.path(), more);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert_eq!(replayed(&[]), "5 decisions, 0 differ, 1 moves recorded, 1 would have been made\n");
    assert_eq!(replayed(&["--all"]).lines().count(), 11);
    let off = replayed(&["--set", "adaptation.mode=Off"]);
    assert!(off.ends_with("5 decisions, 5 differ, 1 moves recorded, 0 would have been made\n"), "{off}");
    assert_eq!(off.matches("now  keep: adaptation is off").count(), 5);
    let calm = replayed(&["--set", "threshold=1.5"]);
    assert!(
        calm.contains("step 120 ") && calm.contains("was  adopt revision 2") && calm.contains("now  keep: nothing new")
    );
    assert!(calm.ends_with("5 decisions, 2 differ, 1 moves recorded, 0 would have been made\n"), "{calm}");
    let careful = replayed(&["--set", "mode=recommend", "--set", "minGain=0.1"]);
    assert!(careful.contains("approve it to move"), "{careful}");
}

#[test]
fn settings_and_recordings_that_cannot_be_used_are_named() {
    let run = run();
    for (set, problem) in [
        ("treshold=1", "did you mean \"threshold\"?"),
        ("threshold=0", "must be 0.01 to 10"),
        ("threshold", "not SETTING=VALUE"),
    ] {
        let output = command("replay", run.path(), &["--set", set]);
        assert_eq!(output.status.code(), Some(2), "{set}");
        assert!(text(&output.stderr).contains(problem), "{set}: {}", text(&output.stderr));
    }
    let file = run.path().join("decisions.jsonl");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 100]).unwrap();
    let output = command("replay", run.path(), &[]);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("the last good line is 4: step 130"), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("4 decisions, 0 differ"));
    fs::write(&file, "nothing").unwrap();
    let output = command("replay", run.path(), &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("nothing can be decided again"), "{}", text(&output.stderr));
}

fn command(name: &str, run: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foreshard")).arg(name).arg(run).args(more).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
