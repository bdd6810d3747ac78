"""The documentation as a site: `make docs`.

Its sources are `docs/`, the sections of `deploy/README.md` as a page each, and pages generated from the code. The
navigation is `docs/index.md`, so a page that is not listed there is not in the site, which a test rejects.
"""
