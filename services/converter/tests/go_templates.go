// Renders Ollama's templates by Go's own text/template, for test_converter_modelfile.py: reads JSON cases, writes a JSON list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type call struct {
	Function struct {
		Name      string
		Arguments json.RawMessage
	}
}

type message struct {
	Role, Content, Thinking, ToolName, ToolCallID string
	ToolCalls                                     []call
}

type tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string          `json:"name"`
		Description string          `json:"description,omitempty"`
		Parameters  json.RawMessage `json:"parameters"`
	} `json:"function"`
}

type testCase struct {
	Template, System string
	Messages         []*message
	Tools            []tool
}

func main() {
	var cases []testCase
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	asJSON := func(v any) string {
		b, _ := json.Marshal(v)
		return string(b)
	}
	texts := []string{}
	for _, c := range cases {
		parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": asJSON}).Parse(c.Template))
		var b strings.Builder
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Tools": c.Tools, "Response": ""}
		if err := parsed.Execute(&b, values); err != nil {
			b.WriteString("ERROR " + err.Error())
		}
		texts = append(texts, b.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		panic(err)
	}
}
