use std::path::Path;

use super::*;

const BUNDLES: [&str; 5] = ["char_gpt", "scan_gpt", "convnet_digits", "mlp_digits", "torch_mlp"];

fn load(bundle: &str) -> Model {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles").join(format!("{bundle}.bundle"));
    Model::import(&mut |file| std::fs::read(directory.join(file))).unwrap()
}

fn split(tensor: &str, axis: usize, parts: u32) -> Split {
    Split { tensor: tensor.to_owned(), axis, parts }
}

/// Megatron's: columns of what comes first, rows of what comes second, heads.
fn of_transformer(parts: u32) -> Vec<Split> {
    let columns = ["mlp.up", "attn.wq", "attn.wk", "attn.wv"].map(|name| split(&format!("blocks.*.{name}"), 1, parts));
    let rows = ["mlp.up_bias", "mlp.down", "attn.wo"].map(|name| split(&format!("blocks.*.{name}"), 0, parts));
    columns.into_iter().chain(rows).collect()
}

fn names<'a>(graph: &'a Graph, end: &'a str) -> Vec<&'a str> {
    graph.ops().map(|(_, op)| op.name.as_str()).filter(|n| n.contains(end)).collect()
}

#[test]
fn columns_then_rows_and_heads_are_never_joined() {
    let model = load("char_gpt");
    for parts in [2, 4] {
        let split = model.split(&of_transformer(parts)).unwrap();
        assert_eq!(split.state.len(), split.init.outputs().len());
        for grad in &split.grads {
            assert_eq!(names(&grad.graph, ".whole"), Vec::<&str>::new(), "{}", grad.name);
            // A sum for each MLP and each attention, forward and backward, and for what norms get back of q, k and v.
            assert!(names(&grad.graph, ".sum").len() >= 4 * (parts as usize - 1) * 4);
        }
        assert_eq!(names(&split.update, ".whole"), Vec::<&str>::new());
        let opcodes = |graph: &Graph, opcode: &str| graph.ops().filter(|(_, op)| &*op.opcode == opcode).count();
        assert_eq!(opcodes(&split.update, "slice"), opcodes(&model.update, "slice"));
        // Half of the hidden values, in every op.
        let hidden = |graph: &Graph| {
            graph.ops().filter(|(_, op)| op.shape.as_array().is_some_and(|s| s.dims.ends_with(&[512]))).count()
        };
        assert!(hidden(&model.grads[0].graph) > 0);
        assert_eq!(hidden(&split.grads[0].graph), 0);
    }
}

#[test]
fn state_comes_in_parts_with_its_slots() {
    let model = load("char_gpt").split(&of_transformer(2)).unwrap();
    let at = |name: &str| model.state.iter().position(|t| t.name == name).unwrap_or_else(|| panic!("{name}"));
    let second = at("blocks.1.mlp.up[:,256:512]");
    assert_eq!(model.state[second].shape.dims, [128, 256]);
    assert_eq!(model.state[at("opt.1.0.mu.blocks.1.mlp.up[:,256:512]")].param, Some(second));
    assert_eq!(model.state[at("opt.1.0.nu.blocks.1.norm1.scale")].param, Some(at("blocks.1.norm1.scale")));
    // Bytes of all pieces are those of the tensor, each once.
    for tensor in 0..model.manifest.params.len() {
        let runs = model.state.iter().filter(|t| t.tensor == tensor).flat_map(|t| t.byte_runs(&model.manifest));
        let mut runs: Vec<_> = runs.collect();
        runs.sort_by_key(|r| r.start);
        let end = runs.iter().fold(0, |at, run| if run.start == at { run.end } else { u64::MAX });
        let shape = &model.manifest.params[tensor].shape;
        assert_eq!(end, shape.iter().product::<u64>() * 4, "{}", model.manifest.params[tensor].name);
    }
}

#[test]
fn stacked_layers_are_split_behind_their_leading_axis() {
    let model = load("scan_gpt");
    let split = model.split(&[split("layers.up", 2, 2), split("layers.down", 1, 2)]).unwrap();
    let names: Vec<&str> = split.state.iter().map(|t| t.name.as_str()).filter(|n| n.starts_with("layers.up")).collect();
    assert_eq!(names[..3], ["layers.up[0][:,:,0:128]", "layers.up[0][:,:,128:256]", "layers.up[1][:,:,0:128]"]);
}

/// Whatever is split, what comes out is sound, and the same whenever it is asked for.
#[test]
fn any_param_can_be_split_along_any_axis() {
    for bundle in BUNDLES {
        let model = load(bundle);
        let mut all = Vec::new();
        for (i, param) in model.manifest.params.iter().enumerate() {
            let rows = model.state.iter().any(|t| t.tensor == i && t.rows.is_some());
            for (axis, &n) in param.shape.iter().enumerate().skip(usize::from(rows)) {
                // Parts need not be equal.
                let parts = if n < 3 { n as u32 } else { 3 };
                if n > 1 && (bundle != "char_gpt" || param.name.starts_with("blocks.1") || i > 60) {
                    let one = [split(&param.name, axis, parts)];
                    model.split(&one).unwrap_or_else(|e| panic!("{bundle}: {one:?}: {e}"));
                }
                if n > 1 && (i + axis) % 2 == 0 && all.iter().all(|s: &Split| s.tensor != param.name) {
                    all.push(split(&param.name, axis, parts));
                }
            }
        }
        let (first, second) = (model.split(&all).unwrap(), model.split(&all).unwrap());
        assert_eq!(format!("{:?}", first.grads), format!("{:?}", second.grads));
        assert_eq!(first.fingerprint, second.fingerprint);
        assert_eq!(first.origin, model.fingerprint);
        assert_ne!(first.fingerprint, model.fingerprint);
    }
}

#[test]
fn says_what_does_not_fit() {
    let (model, stacked) = (load("mlp_digits"), load("scan_gpt"));
    let name = &model.manifest.params.iter().find(|p| p.shape.len() == 2).unwrap().name;
    for (model, splits, says) in [
        (&model, vec![split("nothing", 0, 2)], "no param of the model has such a name"),
        (&model, vec![split(name, 2, 2)], "axis 2, "),
        (&model, vec![split(name, 0, 1)], "1 parts, must be 2 to 64"),
        (&model, vec![split("layer2.w", 1, 60)], "60 parts, axis 1 of"),
        (&model, vec![split(name, 0, 2), split("*", 0, 2)], "is split already, by"),
        (&stacked, vec![split("layers.up", 0, 2)], "is its layers"),
        (&stacked, vec![split("layers.upp", 1, 2)], "did you mean \"layers.up\"?"),
    ] {
        let e = model.split(&splits).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains(says), "{e:?} lacks {says:?}");
    }
    let once = stacked.split(&[split("head", 1, 2)]).unwrap();
    assert!(once.split(&[split("embed", 1, 2)]).is_err());
    assert_eq!(stacked.split(&[]).unwrap().fingerprint, stacked.fingerprint);
}

#[test]
fn stars_stand_for_any_characters() {
    for (pattern, name, expected) in [
        ("a.b", "a.b", true),
        ("a.b", "a.bc", false),
        ("a.*", "a.", true),
        ("*", "", true),
        ("*.up", "blocks.0.up", true),
        ("*.up", "blocks.0.up_bias", false),
        ("a*a", "a", false),
        ("a*b*c", "a.b.b.c", true),
        ("a*b*c", "a.c.b", false),
        ("**", "x", true),
        ("a**b*", "a1b2", true),
    ] {
        assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
    }
}

/// From the columns of one weight to all that Megatron splits.
#[test]
fn splits_that_go_together_are_found() {
    let gpt = candidates(&load("char_gpt"), 2);
    let mlp = [("blocks.*.mlp.down", 0), ("blocks.*.mlp.up", 1), ("blocks.*.mlp.up_bias", 0)];
    let heads = [("attn.wk", 1), ("attn.wo", 0), ("attn.wq", 1), ("attn.wv", 1)];
    let of = |list: &[(&str, usize)], before: &str| -> Vec<Split> {
        list.iter().map(|(name, axis)| split(&format!("{before}{name}"), *axis, 2)).collect()
    };
    assert!(gpt.contains(&of(&mlp, "")), "{gpt:#?}");
    assert!(gpt.contains(&of(&heads, "blocks.*.")), "{gpt:#?}");
    let model = load("mlp_digits");
    let found = candidates(&model, 2);
    let expected = of(&[("layer1.b", 0), ("layer1.w", 1), ("layer2.w", 0)], "");
    assert!(found.contains(&expected), "{found:#?}");
    for splits in found {
        model.split(&splits).unwrap();
    }
}
