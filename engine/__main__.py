"""`python -m cierzo.engine` is the `cierzo` command."""

from cierzo.engine.cli import main

raise SystemExit(main())
