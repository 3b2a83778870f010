"""`python -m skipfold`, the same as the command `skipfold`."""

import sys

from skipfold.commands import main

if __name__ == "__main__":
    sys.exit(main())
