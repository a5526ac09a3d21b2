// Renders conversations with Go's own template engine, which is Ollama's.
// stdin: {"template": text, "conversations": [[{"role", "content"}]]}; stdout: [prompt].  The data is laid out as ollama's template.go does it.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type request struct {
	Template      string
	Conversations [][]message
}

func main() {
	var asked request
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	turns := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	prompts := []string{}
	for _, conversation := range asked.Conversations {
		var systems []string
		for _, m := range conversation {
			if m.Role == "system" {
				systems = append(systems, m.Content)
			}
		}
		var prompt strings.Builder
		given := map[string]any{"System": strings.Join(systems, "\n\n"), "Messages": conversation, "Response": ""}
		if err := turns.Execute(&prompt, given); err != nil {
			panic(err)
		}
		prompts = append(prompts, prompt.String())
	}
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	if err := out.Encode(prompts); err != nil {
		panic(err)
	}
}
