"""What is written here is loaded right by the peft that is installed; and the check finds an adapter that is not."""

import importlib.util
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_form_is_loaded_and_another_scale_is_found(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("load_with_peft", ROOT / "scripts" / "load_with_peft.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write(tmp_path)
    assert script.check(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and not any("WRONG" in line for line in lines)
    for directory in [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "lora-peft-fp32"]:
        shutil.rmtree(directory)
    file = tmp_path / "lora-peft-fp32" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"q_proj": 60}}))
    assert script.check(tmp_path) == 1 and capsys.readouterr().out.endswith(": WRONG\n")
