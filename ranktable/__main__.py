import sys

from ranktable.cli import main

sys.exit(main())
