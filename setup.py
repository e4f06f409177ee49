"""Installs covidsev. Everything it says is read from settings.ini, the single source of truth."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = here / "README.md"


def lines(key):
    """The non-empty lines of a setting."""
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


suffix = "_requirements"
extras = {key.removesuffix(suffix): lines(key) for key in cfg if key.endswith(suffix)}
extras["all"] = sorted({line for group in extras.values() for line in group})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=[*find_packages(include=["covidsev", "covidsev.*"]), "covidsev.weights"],
    package_dir={"covidsev.weights": "weights"},  # the trained networks, CC BY-NC-SA 4.0: see their cards
    package_data={"": ["*.csv", "*.json", "*.toml", "*.j2", "templates/*"],
                  "covidsev.weights": ["*.safetensors", "*.json", "*.md"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
)
