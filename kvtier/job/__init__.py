"""The main job: real chat sessions of a real model, played through the tiers and checked against playing them without."""
