"""Prompts of a benchmark: short requests of many sorts, as people make them in a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.backbone.checkpoints.chat_template import ChatTemplate

PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Write a polite email that asks a colleague for last month's report.",
    "What should I cook with two eggs, rice and spinach?",
    "Give me three reasons to learn to swim.",
    "Describe a small harbour town on a winter morning.",
    "How does a bicycle stay upright?",
    "Summarise the story of the tortoise and the hare.",
    "Name four rivers in Europe and say where each one ends.",
    "Write a short poem about a lighthouse.",
    "What is the difference between weather and climate?",
    "I cannot sleep. What could help?",
    "Explain what a prime number is, with examples.",
    "Plan a day in a city that I have never visited.",
    "Why do leaves change colour in autumn?",
    "Write the opening paragraph of a detective story.",
    "How do I remove a coffee stain from a cotton shirt?",
    "Compare trains and planes for a journey of five hundred kilometres.",
    "What does a librarian do all day?",
    "Tell me about the life of honey bees.",
    "Give advice to somebody who starts a new job on Monday.",
    "How is paper made?",
    "Write a dialogue between a baker and a customer who wants bread without salt.",
    "Explain how to tie a bow tie, step by step.",
    "What are the phases of the moon?",
    "Suggest names for a grey cat and explain each one.",
    "Why is the sea salty?",
    "Write instructions for watering house plants while I am away.",
    "What makes a good question?",
    "Describe the taste of a lemon to somebody who has never had one.",
    "How can a small shop attract more customers?",
    "Explain the rules of chess in a few sentences.",
    "What happened to the dinosaurs?",
    "Write a birthday greeting for a grandmother who loves gardening.",
    "How do vaccines work?",
    "Give me a list of things to pack for a week in the mountains.",
    "What is the purpose of a budget?",
    "Tell a joke about computers and explain it.",
    "How are rainbows formed?",
    "Write a short review of a restaurant with good food and slow service.",
    "Which exercises can I do at a desk?",
    "Explain the word serendipity and use it in a sentence.",
    "How did people tell the time before there were clocks?",
    "Write a letter of thanks to a teacher.",
    "What is compost, and how do I start one?",
    "Describe how a bill becomes a law.",
    "Why do we yawn?",
    "Give a simple recipe for tomato soup.",
    "What should I think about before I adopt a dog?",
    "Explain electricity by comparing it to water in pipes.",
    "Write two sentences that a weather forecaster might say before a storm.",
)


def chat_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, in the model's chat template, where it has one."""
    with ChatTemplate(tokenizer) as template:
        if not template.exists:
            return [tokenizer(prompt)["input_ids"] for prompt in prompts]
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [template.render(turn, add_generation_prompt=True) for turn in turns]
        # The template has put special tokens there.
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
