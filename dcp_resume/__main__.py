"""``python -m dcp_resume``."""

import sys

from dcp_resume.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
