"""`python -m gensr …` is `gensr …`, even if the current folder holds a user's file trainer.py, which would
hide `python -m trainer`."""

from gensr.own import prefer

if __name__ == "__main__":
    prefer()
    from trainer.cli import main

    main()
