"""`python -m gensr …` is `gensr …`, also where the current folder holds a file trainer.py of the user, which
would hide `python -m trainer`."""

from gensr.own import prefer

if __name__ == "__main__":
    prefer()
    from trainer.cli import main

    main()
