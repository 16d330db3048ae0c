"Builds the package from `settings.ini`, the one home of its name, version and requirements."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root/"settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

def lines(key): return [line.strip() for line in settings.get(key, "").splitlines() if line.strip()]

extras = {name: lines(f"{name}_requirements") for name in ("lab", "search", "cluster", "eval", "tracker", "dev")}
extras["dev"] = extras["lab"] + extras["dev"]

class WithNotebooks(build_py):
    "Ships the notebooks too, for `dpo_lab lab`."
    def run(self):
        super().run()
        if self.editable_mode: return
        for file in (root/"nbs").rglob("*.*"):
            if file.suffix not in (".ipynb", ".png", ".json", ".csv", ".jsonl", ".py"): continue
            if {".ipynb_checkpoints", "runs"} & {*file.parts}: continue
            place = Path(self.build_lib)/"dpo_lab"/"nbs"/file.relative_to(root/"nbs")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)

setup(
    cmdclass={"build_py": WithNotebooks},
    name=settings["lib_name"], version=settings["version"], description=settings["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    license=settings["license"], author=settings["author"], keywords=settings["keywords"].split(),
    python_requires=f">={settings['min_python']}",
    packages=find_namespace_packages(include=["dpo_lab*"], exclude=["*__pycache__"]), include_package_data=True,
    package_data={"dpo_lab": ["assets/**/*", "py.typed"]},
    install_requires=lines("requirements"), extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["dpo_lab=dpo_lab._modidx:d"],
                  "inspect_ai": ["dpo_lab=dpo_lab.inspect_provider"]},
)
