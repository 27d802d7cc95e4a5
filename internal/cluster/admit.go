package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"timonel/pki"
)

// tokenLife is how long an agent that is started has to join.
const tokenLife = 10 * time.Minute

// tokenFile holds the token that an agent joins with.
func (s *Spec) tokenFile(name string) string { return filepath.Join(s.dir(name), "token") }

// admit lets an agent that has no credentials join: with a token of its own, for its
// name alone. A name that is bound to the key of a disk that was wiped is reset, as
// an administrator does for a machine that was built anew.
func (s *Spec) admit(ctx context.Context, name string) error {
	_, loadErr := pki.LoadNode(filepath.Join(s.DataDir(name), "pki"), name)
	if loadErr == nil {
		if _, err := os.Stat(s.tokenFile(name)); errors.Is(err, os.ErrNotExist) {
			return s.writeToken(name, "") // the flag names it
		}
		return nil
	}
	c, err := newClient(s)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	var bound []struct {
		Name    string    `json:"name"`
		Key     string    `json:"key"`
		Revoked time.Time `json:"revoked"`
	}
	if err := c.operate(ctx, http.MethodGet, "/timonel/v1/nodes", nil, &bound); err != nil {
		return fmt.Errorf("let agent %s join: %w", name, err)
	}
	for _, b := range bound {
		if b.Name != name || b.Key == "" && b.Revoked.IsZero() {
			continue
		}
		if !b.Revoked.IsZero() {
			return fmt.Errorf("node %s was revoked: `timonel node reset %[1]s` first", name)
		}
		if errors.Is(loadErr, pki.ErrNodeExpired) {
			continue // its key is good, and is certified anew
		}
		if _, err := os.Stat(filepath.Join(s.DataDir(name), "join.key")); err == nil {
			continue // it has not got its answer yet
		}
		reason := map[string]string{"reason": "its disk was wiped"}
		if err := c.operate(ctx, http.MethodPost, "/timonel/v1/nodes/"+name+"/reset", reason, nil); err != nil {
			return fmt.Errorf("let agent %s join: %w", name, err)
		}
	}
	var token struct {
		Text string `json:"text"`
	}
	err = c.operate(ctx, http.MethodPost, "/timonel/v1/tokens", map[string]any{
		"ttlSeconds": int64(tokenLife / time.Second), "uses": 1, "names": []string{name}, "description": "timonel up",
	}, &token)
	if err != nil {
		return fmt.Errorf("let agent %s join: %w", name, err)
	}
	return s.writeToken(name, token.Text)
}

func (s *Spec) writeToken(name, text string) error {
	if err := os.MkdirAll(s.dir(name), 0o755); err != nil {
		return fmt.Errorf("write the token of agent %s: %w", name, err)
	}
	if text != "" {
		text += "\n"
	}
	if err := os.WriteFile(s.tokenFile(name), []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the token of agent %s: %w", name, err)
	}
	return nil
}

// operate asks controllers in turn for an operator's path, until one answers or ctx
// ends. What is refused is not asked for again.
func (c *client) operate(ctx context.Context, method, path string, send, answer any) error {
	last := errors.New("no controller answers")
	err := poll(ctx, 100*time.Millisecond, func() (bool, error) {
		for _, name := range c.spec.ControllerNames() {
			again, err := c.ask(ctx, name, method, path, send, answer)
			if err == nil {
				return true, nil
			}
			if !again {
				return false, err
			}
			last = err
		}
		return false, nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return last
	}
	return err
}

func (c *client) ask(ctx context.Context, name, method, path string, send, answer any) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*attempt)
	defer cancel()
	content, err := json.Marshal(send)
	if err != nil {
		return false, err
	}
	request, err := http.NewRequestWithContext(ctx, method, "https://"+c.spec.APIAddress(name)+path, bytes.NewReader(content))
	if err != nil {
		return false, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return true, err
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(response.Body, 8<<20))
	if err != nil {
		return true, err
	}
	if response.StatusCode != http.StatusOK {
		return response.StatusCode >= 500 || response.StatusCode == http.StatusTooManyRequests,
			fmt.Errorf("controller %s answers %s: %s", name, response.Status, bytes.TrimSpace(raw))
	}
	if answer == nil {
		return false, nil
	}
	return false, json.Unmarshal(raw, answer)
}
