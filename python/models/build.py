"""Writes the bundles of all sample models: `python -m models.build ../bundles`."""

import importlib
import sys
from pathlib import Path

from foreshard import cli

MODELS = ["char_gpt", "mlp_digits", "convnet_digits", "scan_gpt", "torch_mlp"]


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "../bundles")
    for name in MODELS:
        model = importlib.import_module(f"models.{name}").model()
        print(cli.export_arguments(target / f"{name}.bundle", model))


if __name__ == "__main__":
    main()
