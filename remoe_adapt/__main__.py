"""`python -m remoe_adapt` is `remoe`: for `accelerate launch -m remoe_adapt train ...`."""

from remoe_adapt.cli import main

if __name__ == "__main__":
    main()
