#!/usr/bin/env python
"""Write the synthetic data set: the same as ``python -m ddetr_d2.data.synthetic``."""

from ddetr_d2.data.synthetic import main

if __name__ == "__main__":
    main()
