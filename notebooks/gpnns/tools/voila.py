"""Settings of Voila for `make app`, which names this folder: a notebook's app alone, here only, with a token.

The cells tagged `app`, and the parameters, are all that an app needs. They run as one cell whose outputs are dropped,
but the last, which is what a visitor sees under the notebook's title and the texts tagged `app`. A notebook without
such cells is served whole.
"""

from nbformat.v4 import new_code_cell, new_markdown_cell


def serve_app_alone(handler, notebook, cwd):
    """The notebook cut down to its app; handler and cwd are what Voila passes to every hook."""
    tags = [set(cell.metadata.get("tags", [])) for cell in notebook.cells]
    if not any("app" in own for own in tags):
        return notebook
    wanted = {"app", "parameters", "injected-parameters"}
    cells = [cell for cell, own in zip(notebook.cells, tags, strict=True) if wanted & own]
    *preparing, showing = [cell.source for cell in cells if cell.cell_type == "code"]
    title = notebook.cells[0].source.partition("\n")[0]
    texts = [title, *(cell.source for cell in cells if cell.cell_type == "markdown")]
    notebook.cells = [
        new_code_cell("\n\n".join(["%%capture", *preparing])),
        *map(new_markdown_cell, texts),
        new_code_cell(showing),
    ]
    return notebook


c = get_config()  # noqa: F821 - Jupyter's name for what a settings file sets
c.VoilaConfiguration.prelaunch_hook = serve_app_alone
c.VoilaConfiguration.show_tracebacks = True  # a parameter that cannot be used says so to whoever set it
c.Voila.ip = "localhost"
c.Voila.auto_token = True  # Voila's own default is none, and a kernel would be anybody's
