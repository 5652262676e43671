use foreshard::plan::*;
use foreshard::topology::*;
use foreshard::units::*;
#[test]
fn tryout() {
    let name = std::env::var("B").unwrap();
    let t = std::time::Instant::now();
    let model = foreshard::local::bundle::load(std::path::Path::new(&name)).unwrap();
    println!(
        "import {:?}; grads {:?} update {} init {} params {}",
        t.elapsed(),
        model.grads.iter().map(|g| (g.name.clone(), g.graph.n_ops())).collect::<Vec<_>>(),
        model.update.n_ops(),
        model.init.n_ops(),
        model.n_params
    );
    let dev = Device {
        name: "cpu".into(),
        kind: "cpu".into(),
        node: "n".into(),
        flops: FlopsPerSec(3e10),
        bandwidth: BytesPerSec(8e9),
        overhead: Seconds(2e-6),
        memory: Bytes(4 << 30),
        speed: 1.0,
    };
    for n in 1..=4 {
        let topology = solve::even_topology(n, &dev, Link { bandwidth: BytesPerSec(2e9), latency: Seconds(5e-5) });
        for m in [None] {
            let t = std::time::Instant::now();
            let p = Problem {
                model: &model,
                topology: &topology,
                n_shards: n as u32,
                n_replicas: 1,
                microbatch: m,
                schedule: ScheduleKind::OneFOneB,
            };
            match solve(&p, None) {
                Ok(plan) => {
                    println!(
                        "{n}: {:?} mb {} step {} bound {} cut {} segs {:?}",
                        t.elapsed(),
                        plan.microbatch,
                        plan.step_time,
                        plan.bound,
                        plan.bytes_cut,
                        plan.orders
                            .values()
                            .next()
                            .unwrap()
                            .iter()
                            .map(|o| o.len() as u32 / plan.n_microbatches)
                            .collect::<Vec<_>>()
                    );
                    for s in &plan.shards {
                        println!("   busy {} mem {} sent {}", s.busy, s.memory, s.sent);
                    }
                }
                Err(e) => println!("{n}: {e}"),
            }
        }
    }
}
#[test]
fn crossing() {
    use foreshard::plan::segment::*;
    let name = std::env::var("B").unwrap();
    let n: usize = std::env::var("N").unwrap_or("2".into()).parse().unwrap();
    let model = foreshard::local::bundle::load(std::path::Path::new(&name)).unwrap();
    let dev = Device {
        name: "cpu".into(),
        kind: "cpu".into(),
        node: "n".into(),
        flops: FlopsPerSec(3e10),
        bandwidth: BytesPerSec(8e9),
        overhead: Seconds(2e-6),
        memory: Bytes(4 << 30),
        speed: 1.0,
    };
    let topology = solve::even_topology(n, &dev, Link { bandwidth: BytesPerSec(2e9), latency: Seconds(5e-5) });
    let p = Problem {
        model: &model,
        topology: &topology,
        n_shards: n as u32,
        n_replicas: 1,
        microbatch: None,
        schedule: ScheduleKind::OneFOneB,
    };
    let plan = solve(&p, None).unwrap();
    for (v, a) in &plan.grads {
        let g = &model.variant(v).unwrap().graph;
        let cut = Segmentation::new(g, a, &plan.grad_results(&model, g, a), n, Parameters::Mirrored).unwrap();
        for m in &cut.messages {
            println!("{v} {:?} L{} -> {:?}", cut.segments[m.from].shard, cut.segments[m.from].level, m.to);
            let mut vs: Vec<_> = m.values.iter().map(|&v| (g.op(v).shape.bytes(), v)).collect();
            vs.sort();
            vs.reverse();
            for (b, v) in vs.iter().take(12) {
                println!(
                    "    {b} {v} {} {} users {:?}",
                    g.op(*v).opcode,
                    g.op(*v).scope().unwrap_or(""),
                    g.users(*v)
                        .iter()
                        .map(|u| format!("{} {} {:?}", g.op(*u).opcode, g.op(*u).scope().unwrap_or(""), a.place(*u)))
                        .collect::<Vec<_>>()
                );
            }
        }
        let cs = foreshard::cost::of_graph(g);
        let co = coordinate::coordinates(g, model.n_params, model.n_scalars(), &cs);
        if std::env::var("D").is_ok() {
            for (id, op) in g.ops() {
                println!(
                    "{id} {} {:?} {} fwd {} {} {:?}",
                    op.opcode,
                    co.of[id.index()],
                    op.shape,
                    co.forward[id.index()],
                    op.scope().unwrap_or(""),
                    op.operands
                );
            }
        }
        break;
    }
}
