"""JupyterLab as `make lab` starts it: what is saved is cleaned like `nbdev_clean`, with git or without."""

from nbdev.clean import clean_jupyter

c.FileContentsManager.pre_save_hook = clean_jupyter  # noqa: F821
