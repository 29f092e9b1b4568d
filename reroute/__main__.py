"""``python -m reroute``."""

from .cli import main

raise SystemExit(main())
