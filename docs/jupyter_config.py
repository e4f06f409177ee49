"""JupyterLab as `make lab` starts it: what is saved is cleaned like `nbdev_clean`, with git or without."""

from nbdev.clean import clean_jupyter


def clean(path, model, **more):
    """A page of the viewer holds a scan and is left out; its strip of slices stays."""
    if model["type"] == "notebook":
        for cell in model["content"]["cells"]:
            for output in cell.get("outputs", ()):
                if "".join(output.get("data", {}).get("text/html", "")).startswith("<iframe srcdoc"):
                    del output["data"]["text/html"]
    clean_jupyter(path, model, **more)


c.FileContentsManager.pre_save_hook = clean  # noqa: F821
