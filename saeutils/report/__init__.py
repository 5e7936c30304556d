"""Run notebooks and turn them into pages: what `make notebooks` calls.

    python -m saeutils.report            every notebook, at its quick size
    python -m saeutils.report 10 --pdf   those that match, as HTML and PDF

`execute` plans and runs (a worker process and a kernel each, several at once),
`worker` is what runs in such a process, `pages` writes the HTML.
"""
