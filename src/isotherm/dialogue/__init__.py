"""What a chat model's text means: messages to prompts, answers to content, reasoning and tool calls."""
