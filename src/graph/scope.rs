//! Named scopes: what people call the parts of their model, in the paths that exporters give ops.

use super::ir::Op;
use super::split::fits;

/// Ops under no named scope.
pub const OTHER: &str = "other";

/// The block an op belongs to: the named scope inside `jvp(...)`, or the loop iteration.
pub fn block_of(scope: &str) -> String {
    let inner = scope.rsplit("jvp(").next().unwrap_or(scope);
    let end = inner.find([')', '/']).unwrap_or(inner.len());
    if scope.contains("jvp(") && end > 0 && !inner[..end].contains("jit") {
        return inner[..end].to_owned();
    }
    if let Some(at) = scope.find("while/body[") {
        let rest = &scope[at + "while/body[".len()..];
        return format!("layer {}", rest.split(']').next().unwrap_or(""));
    }
    OTHER.to_owned()
}

/// Whether a pattern means an op: by its HLO name, its path or its named scope. What computes a derivative is named like what
/// it is the derivative of.
pub fn means(pattern: &str, op: &Op) -> bool {
    let of_scope = |scope: &str| {
        let block = block_of(scope);
        fits(pattern, scope) || block != OTHER && fits(pattern, &block)
    };
    let forward = |scope: &str| scope.replacen("transpose(jvp(", "jvp(", 1).replacen("))", ")", 1);
    fits(pattern, &op.name)
        || op
            .scope()
            .is_some_and(|scope| of_scope(scope) || scope.contains("transpose(jvp(") && fits(pattern, &forward(scope)))
}
