"""`python -m actok`"""

from actok.cli import main

raise SystemExit(main())
