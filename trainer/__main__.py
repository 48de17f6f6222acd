"""`python -m trainer …` is `gensr …`: what accelerate, torchrun and srun start."""

from trainer.cli import main

if __name__ == "__main__":
    main()
