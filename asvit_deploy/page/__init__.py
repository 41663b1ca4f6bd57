"""One HTML page from what `bench`, `check`, `evaluate`, `calibrate` and `visualize` say as JSON.

It runs in one direction: `reading` takes files or dicts and holds each against the schema of its
kind, once; the kind's module turns one report into `facts` (figures for the first screen, blocks
for the sections); `joined` looks at all of them together; `rendering` makes text of that with
`plots`, `pictures` and the template; `writing` is what commands call. Only `plots` knows
matplotlib, `pictures` Pillow, `rendering` Jinja2, and nothing here measures.

A new kind is one module with a `SCHEMA` and a `tell(fields) -> Facts`, and a row of `kinds.KINDS`;
what it shows goes under a section of `facts.SECTIONS`, which may be a new row there. Its command
takes `--html` by `cli.options.html` and calls `writing.require_extra` and `writing.claimed_page`
before it works, and `writing.write` with its own JSON at the end.
"""
