"""The public-domain text that ships: what the demo asks about, and what start-up reads to learn a model's queries."""

from pathlib import Path

DOCUMENT = Path(__file__).with_name("state_of_the_union_1944.txt")  # F. D. Roosevelt's message to Congress
