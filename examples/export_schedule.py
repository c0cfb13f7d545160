"""From a table of benchmark runs to an engine's own configuration. Needs no torch.

    python examples/export_schedule.py [FOLDER] [ENGINE]

Takes the measurements that `planner demo` ships; put your own table in place of its measured.csv.
"""

import sys
from pathlib import Path

import planner


def main(folder: str = "demo", engine: str = "vllm@0.33") -> None:
    demo = planner.demo(folder)
    schedule, profile = Path(folder) / "schedule.json", Path(folder) / "profile.json"
    asked = planner.AskedExport(model="Qwen/Qwen2.5-1.5B-Instruct", drafter="draft_model", draft_model="Qwen/Qwen2.5-0.5B-Instruct")
    export = planner.export(schedule, engine, Path(folder) / "serve", asked, profile_path=profile)
    print(f"planned for {demo.schedule.model} on {demo.schedule.system}")
    for knob in export.knobs:
        print(f"{knob.knob}: {knob.fidelity}{f', {knob.reason}' if knob.reason else ''}")
    print(export.run)


if __name__ == "__main__":
    main(*sys.argv[1:])
