package pki

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"timonel/internal/durable"
)

// Names of the two pools of gossip.
const (
	PoolControllers = "controllers"
	PoolNodes       = "nodes"
)

// GossipKeySize selects AES-256.
const GossipKeySize = 32

// MaxGossipKeys bounds the keys of a pool at a time, as package gossip does.
const MaxGossipKeys = 4

// GossipKeyID names a key of gossip without telling it.
func GossipKeyID(key []byte) string {
	sum := sha256.Sum256(append([]byte("timonel gossip key "), key...))
	return hex.EncodeToString(sum[:6])
}

// GossipKeyIDs are the names of keys.
func GossipKeyIDs(keys [][]byte) []string {
	out := make([]string, 0, len(keys))
	for _, key := range keys {
		out = append(out, GossipKeyID(key))
	}
	return out
}

// GossipKey is what the nodes' pool begins with.
func (b *Bundle) GossipKey() []byte { return bytes.Clone(b.gossipKey) }

// FirstGossipKey is the key that a pool of the cluster begins with, until it is
// rotated: the bundle's gossip.key for nodes, which agents are given, and for
// controllers one that follows from the authority's private key, which no agent has,
// so that a bundle of any age has one.
func (b *Bundle) FirstGossipKey(pool string) ([]byte, error) {
	switch pool {
	case PoolNodes:
		return b.GossipKey(), nil
	case PoolControllers:
		return b.derive("timonel controllers' gossip 1")
	}
	return nil, fmt.Errorf("there is no gossip pool %q", pool)
}

// derive is a key for one purpose, which all who have the bundle know.
func (b *Bundle) derive(purpose string) ([]byte, error) {
	secret, err := x509.MarshalPKCS8PrivateKey(b.ca.key)
	if err == nil {
		secret, err = hkdf.Key(sha256.New, secret, []byte(b.clusterID), purpose, GossipKeySize)
	}
	if err != nil {
		return nil, fmt.Errorf("derive a key from %s: %w", CAKeyFile, err)
	}
	return secret, nil
}

// vault seals what only those may read who have the bundle.
func (b *Bundle) vault() (cipher.AEAD, error) {
	key, err := b.derive("timonel sealed records 1")
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// Seal encrypts a secret, so that whoever has the bundle can read it and nobody else:
// for what is in the cluster's state, and so in backups. with is what it belongs to:
// to another it is not opened.
func (b *Bundle) Seal(plain, with []byte) ([]byte, error) {
	aead, err := b.vault()
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce) // never fails
	return aead.Seal(nonce, nonce, plain, with), nil
}

// Unseal returns what was sealed with a bundle of the same authority.
func (b *Bundle) Unseal(sealed, with []byte) ([]byte, error) {
	aead, err := b.vault()
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", err)
	}
	if len(sealed) < aead.NonceSize() {
		return nil, fmt.Errorf("unseal: %d bytes are too few", len(sealed))
	}
	plain, err := aead.Open(nil, sealed[:aead.NonceSize()], sealed[aead.NonceSize():], with)
	if err != nil {
		return nil, fmt.Errorf("unseal: it was not sealed with this bundle's %s, or was altered", CAKeyFile)
	}
	return plain, nil
}

// gossipKeysFile is what an agent keeps of the nodes' pool since its keys can be
// rotated; without it the key is in [GossipKeyFile].
const gossipKeysFile = "gossip.keys"

// CheckGossipKeys says what is wrong with the keys of a pool.
func CheckGossipKeys(keys [][]byte) error {
	if len(keys) == 0 || len(keys) > MaxGossipKeys {
		return fmt.Errorf("%d gossip keys instead of 1 to %d", len(keys), MaxGossipKeys)
	}
	for _, key := range keys {
		if len(key) != GossipKeySize {
			return fmt.Errorf("a gossip key of %d bytes instead of %d", len(key), GossipKeySize)
		}
	}
	return nil
}

// SaveGossipKeys makes keys those that an agent starts with: the first seals, any
// opens. They are on the disk when it returns.
func SaveGossipKeys(dir string, keys [][]byte) error {
	if err := CheckGossipKeys(keys); err != nil {
		return fmt.Errorf("save gossip keys: %w", err)
	}
	var text strings.Builder
	for _, key := range keys {
		text.WriteString(base64.StdEncoding.EncodeToString(key) + "\n")
	}
	if err := durable.WriteFile(filepath.Join(dir, gossipKeysFile), []byte(text.String()), 0o600); err != nil {
		return fmt.Errorf("save gossip keys: %w", err)
	}
	return nil
}

// loadGossipKeys reads what [SaveGossipKeys] wrote, or the one key of an agent that
// joined before there were several.
func loadGossipKeys(dir string) (keys [][]byte, file string, err error) {
	file = gossipKeysFile
	data, err := readFile(filepath.Join(dir, file), true)
	if errors.Is(err, fs.ErrNotExist) {
		file = GossipKeyFile
		data, err = readFile(filepath.Join(dir, file), true)
	}
	if err != nil {
		return nil, file, err
	}
	for line := range strings.Lines(string(data)) {
		key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(line))
		if err != nil || len(key) != GossipKeySize {
			return nil, file, fmt.Errorf("not a base64 key of %d bytes in each line: join again", GossipKeySize)
		}
		keys = append(keys, key)
	}
	if err := CheckGossipKeys(keys); err != nil {
		return nil, file, fmt.Errorf("%w: join again", err)
	}
	return keys, file, nil
}
