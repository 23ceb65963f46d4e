"""Triton finds in its disk cache what another process compiled, whatever that process launched first."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEYS = """
import sys
from fused_ops.lora import fused
from triton.runtime.jit import JITFunction

functions = {
    f"{module}.{name}": value
    for module in list(sys.modules) if module.startswith("fused_ops.")
    for name, value in vars(sys.modules[module]).items() if isinstance(value, JITFunction)
}
for name in sorted(functions, reverse=sys.argv[1] == "last"):
    functions[name].cache_key
print(*(f"{name} {functions[name].cache_key}" for name in sorted(functions)), sep="\\n")
"""


def keys(first_asked: str) -> list[str]:
    """Return every function's key in a process that asks for them from one end or the other."""
    command = [sys.executable, "-c", KEYS, first_asked]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def test_keys_do_not_depend_on_what_is_launched_first():
    found = keys("first")
    assert len(found) > 30 and found == keys("last")
