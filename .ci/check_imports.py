"""Can an editor follow every import of our own? Collects them, and lets pyright resolve them in a folder.

python .ci/check_imports.py CHECKOUT_OR_SITE_PACKAGES

Checking one file that holds nothing but the imports takes seconds; checking all files takes minutes.
"""

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def own_imports() -> list[str]:
    """Every `import` of tqdm_seg in the checkout, absolute, one statement each."""
    found = set()
    for path in [
        *ROOT.glob("*.py"),
        *(p for d in ("tqdm_seg", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py")),
    ]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[:-1] if parts[0] == "tqdm_seg" else ("tqdm_seg",)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] == "tqdm_seg"}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join([*above, *([node.module] if node.module else [])])
                if module.split(".")[0] == "tqdm_seg":
                    found |= {f"from {module} import {alias.name}" for alias in node.names}
    return sorted(found)


def main(site: Path) -> int:
    """Prints what pyright cannot resolve; the exit status."""
    imports = own_imports()
    settings = {"extraPaths": [str(site.resolve())], "typeCheckingMode": "off", "reportMissingImports": "error"}
    settings |= {"reportAttributeAccessIssue": "error", "reportMissingModuleSource": "none"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "imports.py").write_text("\n".join(imports) + "\n", encoding="utf-8")
        Path(folder, "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
        status = subprocess.run(["pyright", "--project", folder], check=False).returncode
    print(f"{len(imports)} imports of our own in {site}")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
