"""From prompt to text: models, the scheduler, the step loop and what people run."""
