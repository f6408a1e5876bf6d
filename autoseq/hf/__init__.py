"""transformers' and TRL's trainers, and accelerate's loops, with one sequence split over ranks.

    trainer = SFTTrainer(model=model, args=args, train_dataset=data)
    autoseq.hf.attach(trainer, sequence=8)
    trainer.train()

Neither transformers nor accelerate is imported before `attach` is called.
"""

from autoseq.hf.attach import attach

__all__ = ["attach"]
