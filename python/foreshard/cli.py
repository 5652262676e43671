"""`foreshard-export`: a model file to a bundle."""

import argparse
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from .errors import ForeshardExportError

DESCRIPTION = "Exports a training step written in JAX or PyTorch as a bundle, which needs no Python afterwards."
EPILOG = """\
The model file defines one function, model(), that returns the arguments of foreshard.export:

    def model(width=128):
        return dict(
            init=init,                    # init(key) -> params
            loss=loss,                    # loss(params, batch, key) -> loss or (loss, {name: metric})
            optimizer=optax.adamw(3e-4),
            batch={"x": jax.ShapeDtypeStruct((32, 64), jnp.float32), ...},
            microbatches=[8, 32],         # rows per microbatch; each divides the batch
        )

With module= in place of init= it is a PyTorch model, and the arguments are those of foreshard.torch.export.

examples:
    foreshard-export my_model.py                      writes my_model.bundle
    foreshard-export my_model.py -o runs/a.bundle
    foreshard-export my_model.py --set width=256      calls model(width=256)
"""


def load_model(file: Path, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The arguments of `export` that `file` gives, and its module."""
    if not file.is_file():
        raise ForeshardExportError(f"model file {str(file)!r} does not exist; name the Python file that defines model()")
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[file.stem] = module  # dataclasses and pickling look a module up by its name
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as e:
        raise ForeshardExportError(f"model file {str(file)!r} cannot be imported: {type(e).__name__}: {e}") from e
    finally:
        sys.path.pop(0)
    model = getattr(module, "model", None)
    if not callable(model):
        raise ForeshardExportError(f"model file {str(file)!r} defines no function model(); see foreshard-export --help")
    known = inspect.signature(model).parameters
    for name in options:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ForeshardExportError(f"--set {name}: model() in {str(file)!r} takes {list(known)}")
    arguments = model(**options)
    if not isinstance(arguments, dict):
        raise ForeshardExportError(
            f"model() in {str(file)!r} returned {type(arguments).__name__}; return dict(init=..., loss=..., ...)"
        )
    return arguments, module


def parse_options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ForeshardExportError(f"--set {pair!r} is not NAME=VALUE, as in --set width=256")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def export_arguments(path: Path, arguments: dict[str, Any], progress: Any = None) -> Path:
    if "module" in arguments:
        try:
            from .torch import export
        except ImportError as e:
            raise ForeshardExportError(str(e)) from e
    else:
        from .exporter import export
    known = set(inspect.signature(export).parameters) - {"path", "progress"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ForeshardExportError(f"model() returned {unknown}, which export does not take; it takes {sorted(known)}")
    missing = [
        n for n, p in inspect.signature(export).parameters.items()
        if p.default is p.empty and n not in arguments and n != "path"
    ]  # fmt: skip
    if missing:
        raise ForeshardExportError(f"model() returned no {', '.join(missing)}; see foreshard-export --help")
    return export(path, **arguments, progress=progress)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="foreshard-export", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", type=Path, metavar="MODEL.py", help="Python file that defines model()")
    parser.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="default: MODEL.bundle")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="options",
                        help="argument for model(), may be repeated")  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    args = parser.parse_args(argv)
    output = args.output or Path(args.model.stem + ".bundle")
    say = (lambda _: None) if args.quiet else (lambda line: print(line, flush=True))
    try:
        arguments, _ = load_model(args.model, parse_options(args.options))
        export_arguments(output, arguments, say)
    except ForeshardExportError as e:
        print(f"foreshard-export: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"foreshard-export: error: cannot write {e.filename or output}: {e.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
