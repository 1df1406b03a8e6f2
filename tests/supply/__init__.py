"""What the mesh is made of: the lock, the licences, the bill of materials, the known vulnerabilities.

`make lock`, `make sbom` and `make audit` run this package; `docs/dependencies.md` is written by it.
"""
