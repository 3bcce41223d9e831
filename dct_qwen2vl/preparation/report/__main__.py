"""report.html on a prepared set: python -m dct_qwen2vl.preparation.report SHARDS"""

import sys

from dct_qwen2vl.preparation.report.writing import main

if __name__ == "__main__":
    sys.exit(main())
