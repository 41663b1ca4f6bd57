"""One HTML page from what `bench`, `check`, `evaluate`, `calibrate` and `visualize` say as JSON.

It runs in one direction: `reading` takes files or dicts and checks them against the schema of their
kind, once; the kind's module turns one report into `facts` (figures for the first screen, and blocks
for the sections); `joined` looks at all of them together; `writing` renders that with `plots`,
`pictures` and the template. Nothing but `plots`, `pictures` and `writing` knows matplotlib, Pillow or
Jinja2, and nothing here measures.

A new kind is one module with a `SCHEMA` and a `tell(fields) -> Facts`, and one row of `kinds.KINDS`;
what it shows goes under a section of `facts.SECTIONS`, which may be a new row there. Its command
takes `--html` by `cli.options.html` and calls `writing.require_extra` and `writing.claimed_page`
before it works, and `writing.write` with its own JSON at the end.
"""
