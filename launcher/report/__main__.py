"""`python -m launcher.report RUN... --out DIR`"""

import sys

from launcher.report import main

if __name__ == "__main__":
    sys.exit(main())
