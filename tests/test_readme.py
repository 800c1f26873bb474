"""The README's ten lines run as printed, and its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    shown = {}
    exec(code.replace('"minialign/', f'"{ROOT}/minialign/'), shown)
    assert len(shown["history"]) == 5
    shown["pipe"].unload_lora_weights()
    shown["pipe"].load_lora_weights(tmp_path / "my_adapter", weight_name="pytorch_lora_weights.safetensors")


def test_links_and_chapters_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for chapter in (ROOT / "solutions").glob("*.ipynb"):
        assert f"notebooks/{chapter.name}" in README, f"{chapter.name} is missing from the README's map"
