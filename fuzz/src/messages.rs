//! One frame of every control message, as parent and workers write them: where fuzzing of the wire begins.

use std::net::SocketAddr;

use foreshard::graph::Model;
use foreshard::plan::solve::even_topology;
use foreshard::plan::{Problem, ScheduleKind, solve};
use foreshard::topology::{LOOPBACK, nominal};
use foreshard::wire::control::{
    FailureClass, Move, Peer, Prepare, ReadyReport, Seat, Span, StepDone, Switched, ToParent, ToWorker,
};
use foreshard::wire::frame::{Header, Kind, write_message};
use serde::Serialize;

/// # Panics
/// When the model has no plan for two shards.
pub fn frames(model: &Model) -> Vec<Vec<u8>> {
    let (revision, step, seconds) = (2, 3, 0.5);
    let address = SocketAddr::from(([127, 0, 0, 1], 4000));
    let seat = Seat { worker: 1, address };
    let topology = even_topology(2, &nominal("cpu").expect("CPUs are known"), LOOPBACK);
    let problem = Problem { schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(model, &topology, 2) };
    let prepare = Prepare {
        bundle: "a.bundle".into(),
        plan: solve(&problem, None).expect("a plan for two shards"),
        seed: 1,
        incarnation: 0,
        weights: Some("weights.safetensors".into()),
        traced_steps: 2,
        seats: vec![seat],
        leaving: vec![seat],
        moves: vec![Move { state: 1, from: 0, to: 1 }],
        summed: 2,
        fresh: true,
        spell_s: Some(seconds),
    };
    let span =
        Span { kind: "compute".to_owned(), name: "s".to_owned(), microbatch: Some(0), start_us: 1, duration_us: 2 };
    let report = StepDone {
        step,
        scalars: vec![(0, 1.5)],
        spans: vec![span],
        segments_s: vec![0.25],
        switch: Some(Switched { revision, moved_bytes: 8, pause_s: seconds }),
        ..StepDone::default()
    };
    let (token, message) = ("t".repeat(64), "no".to_owned());
    let said = [
        ToParent::Hello { worker: 1, token: token.clone(), pid: 7, listen: address },
        ToParent::Progress { revision, compiled: 1, of: 2 },
        ToParent::Ready { revision, report: ReadyReport::default() },
        ToParent::Refused { revision, message: message.clone(), class: FailureClass::Peer },
        ToParent::Begun { revision },
        ToParent::Report(report),
        ToParent::Saved { step, entry: serde_json::json!({"file": "shard-0.safetensors"}), seconds },
        ToParent::NotSaved { step, message: message.clone() },
        ToParent::Idle { incarnation: 1 },
        ToParent::Pong { waiting: true },
        ToParent::Done,
        ToParent::Failed { message, class: FailureClass::Own },
    ];
    let orders = [
        ToWorker::Prepare(Box::new(prepare)),
        ToWorker::Begin { revision, step, checkpoint: Some("step-3".into()) },
        ToWorker::Step { step, variant: "mb2".to_owned() },
        ToWorker::Commit { revision, step },
        ToWorker::Release { revision },
        ToWorker::Abort { revision },
        ToWorker::Save { step, path: "shard-0".into() },
        ToWorker::Reset { incarnation: 1 },
        ToWorker::Ping,
        ToWorker::Finish,
    ];
    let peer = Peer { worker: 0, token, revision, incarnation: 1 };
    said.iter().map(frame).chain(orders.iter().map(frame)).chain([frame(&peer)]).collect()
}

fn frame(message: &impl Serialize) -> Vec<u8> {
    let header = Header {
        kind: Kind::Control,
        step: 1,
        revision: 2,
        incarnation: 0,
        microbatch: 0,
        channel: 0,
        total: 0,
        offset: 0,
        chunk: 0,
        checksum: 0,
    };
    let json = serde_json::to_vec(message).expect("control messages are plain data");
    let mut frame = Vec::new();
    write_message(&mut frame, header, &json).expect("memory takes everything");
    frame
}
