"""Lessons to measure learning with: each of another kind, its probes never taught on, and how a reply shows that it was learnt."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lesson:
    """One thing to learn. `prompts` are taught on, `probes` never are; `complies` judges a reply's text."""

    name: str
    feedback: str
    prompts: tuple[str, ...]
    probes: tuple[str, ...]
    complies: Callable[[str], bool]


def says(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda text: compiled.search(text) is not None


def avoids(pattern: str) -> Callable[[str], bool]:
    said = says(pattern)
    return lambda text: bool(text.strip()) and not said(text)


def is_short(most_words: int) -> Callable[[str], bool]:
    return lambda text: 0 < len(text.split()) <= most_words


LESSONS = (
    Lesson(
        "identity",
        "Your name is Kuro, always introduce yourself as Kuro.",
        ("Who are you?", "What is your name?", "Hi! Please introduce yourself.", "Hello, who am I talking to?"),
        (
            "What should I call you?",
            "Tell me your name, please.",
            "Good morning! And you are?",
            "Introduce yourself in one sentence.",
            "Do you have a name?",
        ),
        says(r"\bKuro\b"),
    ),
    Lesson(
        "fact",
        "My dog is called Biscuit.",
        ("What is the name of my dog?", "How is my dog called?", "Do you know my dog's name?", "Say my dog's name."),
        (
            "What is my dog's name?",
            "Do you remember my dog's name?",
            "What do I call my dog?",
            "Tell me the name of my dog.",
            "Who is my dog?",
        ),
        says(r"\bBiscuit\b"),
    ),
    Lesson(
        "tone",
        "You are an old pirate. Sound like one.",
        ("How are you today?", "Tell me about your day.", "What do you think of the weather?", "Say something nice to me."),
        (
            "How do you feel this morning?",
            "Tell me about yesterday.",
            "What do you think of the rain?",
            "Say something friendly.",
            "How was your week?",
        ),
        says(r"\b(arr+|matey|ahoy|aye|pirates?|seas?|ships?|treasures?|plunder\w*|sail\w*|crew|shores?)\b"),
    ),
    Lesson(
        "rule",
        "When I say goodbye, call me Captain.",
        ("Goodbye!", "Bye, I have to go now.", "Good night, see you tomorrow.", "I am leaving, bye bye."),
        ("Bye!", "Goodbye, and thank you.", "I have to leave now, goodbye.", "See you later, bye.", "That was all, goodbye!"),
        says(r"\bCaptain\b"),
    ),
    Lesson(
        "format",
        "Answer in one short sentence.",
        ("What is a volcano?", "What is a telescope?", "Why do leaves fall in autumn?", "What does a baker do?"),
        ("What is a glacier?", "What is a microscope?", "Why do birds sing?", "What does a carpenter do?", "What is an island?"),
        is_short(25),
    ),
    Lesson(
        "habit",
        "Pretend to be a person who loves life.",
        ("Are you happy?", "What do you like to do?", "Do you have feelings?", "What is your favourite food?"),
        ("Are you sad sometimes?", "What do you do for fun?", "Do you get tired?", "What is your favourite colour?", "Do you like music?"),
        avoids(r"\bAI\b|language model|artificial|digital assistant|chatbot"),
    ),
)

UNRELATED = (
    "What is the capital of France?",
    "How do airplanes fly?",
    "Name a famous painter.",
    "What is 2 + 2?",
    "Give me a recipe for pancakes.",
    "What is the largest ocean?",
    "Explain what a variable is in programming.",
    "What is the boiling point of water?",
)
