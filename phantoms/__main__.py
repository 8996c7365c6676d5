"""`python -m samf.phantoms`: write a data set of phantoms."""

from samf.phantoms.dataset import main

if __name__ == "__main__":
    main()
