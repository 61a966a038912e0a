package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/timestamppb"

	edgemesh "example.com/edge-daemon/gen/edgemesh/v1"
)

// An identity is what the device shows, its certificates and its key, and whom it trusts. All of it PEM; the roots begin with
// a line that names their bundle, so that both change together.
type identity struct{ pair, roots []byte }

func (shown *identity) bundleID() string {
	line, _, _ := strings.Cut(string(shown.roots), "\n")
	return strings.TrimPrefix(line, "# ")
}

func rootsOf(bundle *edgemesh.TrustBundle) []byte {
	return []byte("# " + bundle.GetId() + "\n" + strings.Join(bundle.GetRootsPem(), ""))
}

// adopt trusts the roots of a bundle from the next connection on. It came over a connection that roots trusted before have
// verified.
func adopt(folder string, shown *identity, bundle *edgemesh.TrustBundle) (*identity, error) {
	if len(bundle.GetRootsPem()) == 0 {
		return nil, errors.New("the trust bundle has no root")
	}
	next := &identity{shown.pair, rootsOf(bundle)}
	return next, write(folder, rootsFile, next.roots)
}

// enroll redeems a token. The key is kept before, so that a call whose answer was lost is repeated with the same key and
// gives the same device.
func enroll(ctx context.Context, server, token, folder, id string) (*identity, error) {
	key, err := keyIn(folder)
	if err != nil {
		return nil, err
	}

	// Step 1: The server, before it is told anything. The token ends in the hash of the root that it has to lead to.
	root, err := pinnedRoot(ctx, server, token)
	if err != nil {
		return nil, err
	}

	// Step 2: The request, signed over a challenge of the server.
	conn, err := dial(server, &identity{roots: root})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	client := edgemesh.NewEnrollServiceClient(conn)
	request, err := signingRequest(ctx, client, key)
	if err != nil {
		return nil, err
	}

	// Step 3: The token. The stream stays open while an operator has to approve the device.
	stream, err := client.Enroll(ctx, &edgemesh.EnrollRequest{
		Token:  token,
		Csr:    request,
		Device: &edgemesh.DeviceDescription{Id: id, Type: edgemesh.DeviceType_DEVICE_TYPE_GATEWAY},
		SentAt: timestamppb.Now(),
	})
	if err != nil {
		return nil, err
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if pending := answer.GetPendingApproval(); pending != nil {
			fmt.Printf("an operator has to approve %s\n", pending.DeviceId)
		}
		if issued := answer.GetIdentity(); issued != nil {
			fmt.Printf("enrolled %s\n", issued.SpiffeId)
			return keep(folder, key, issued)
		}
	}
}

// renew asks for a new certificate for a new key, of the same identity.
func renew(ctx context.Context, server, folder string, shown *identity) (*identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	conn, err := dial(server, shown)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	client := edgemesh.NewEnrollServiceClient(conn)
	request, err := signingRequest(ctx, client, key)
	if err != nil {
		return nil, err
	}
	answer, err := client.RenewCertificate(ctx, &edgemesh.RenewCertificateRequest{Csr: request, SentAt: timestamppb.Now()})
	if err != nil {
		return nil, err
	}
	return keep(folder, key, answer.GetIdentity())
}

// dial makes a connection that shows an identity, or none where there is no certificate yet.
func dial(server string, shown *identity) (*grpc.ClientConn, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(shown.roots) {
		return nil, errors.New("there is no root to trust")
	}
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if len(shown.pair) > 0 {
		pair, err := tls.X509KeyPair(shown.pair, shown.pair)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return grpc.NewClient(server, grpc.WithTransportCredentials(credentials.NewTLS(config)))
}

// pinnedRoot asks for the roots over a connection that proves nothing, and believes the one that the token names.
func pinnedRoot(ctx context.Context, server, token string) ([]byte, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 4 || parts[0] != "em1" {
		return nil, errors.New("not an enrollment token: want em1.<id>.<secret>.<key hash>, copied whole")
	}
	unverified := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})
	conn, err := grpc.NewClient(server, grpc.WithTransportCredentials(unverified))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	answer, err := edgemesh.NewEnrollServiceClient(conn).GetTrustBundle(ctx, &edgemesh.GetTrustBundleRequest{})
	if err != nil {
		return nil, err
	}
	for _, text := range answer.GetTrustBundle().GetRootsPem() {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			continue
		}
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			continue
		}
		hash := sha256.Sum256(root.RawSubjectPublicKeyInfo)
		if base64.RawURLEncoding.EncodeToString(hash[:]) == parts[3] && root.CheckSignatureFrom(root) == nil {
			return pem.EncodeToMemory(block), nil
		}
	}
	return nil, fmt.Errorf("%s is not the server that the token is for", server)
}

var (
	challengePassword = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}
	ecdsaWithSHA256   = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
)

type algorithm struct{ ID asn1.ObjectIdentifier }

type attribute struct {
	ID     asn1.ObjectIdentifier
	Values []asn1.RawValue `asn1:"set"`
}

type requestInfo struct {
	Version    int
	Subject    asn1.RawValue
	PublicKey  asn1.RawValue
	Attributes []attribute `asn1:"tag:0,set"`
}

// signingRequest makes a PKCS#10 request with a challenge in its challengePassword, which crypto/x509 has no words for.
func signingRequest(ctx context.Context, client edgemesh.EnrollServiceClient, key *ecdsa.PrivateKey) ([]byte, error) {
	given, err := client.GetChallenge(ctx, &edgemesh.GetChallengeRequest{})
	if err != nil {
		return nil, err
	}
	publicKey, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	challenge := asn1.RawValue{Tag: asn1.TagUTF8String, Bytes: []byte(given.Challenge)}
	info, err := asn1.Marshal(requestInfo{
		// The server names the device, not the request: an empty subject.
		Subject:    asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true},
		PublicKey:  asn1.RawValue{FullBytes: publicKey},
		Attributes: []attribute{{challengePassword, []asn1.RawValue{challenge}}},
	})
	if err != nil {
		return nil, err
	}
	hash := sha256.Sum256(info)
	signature, err := ecdsa.SignASN1(rand.Reader, key, hash[:])
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct {
		Info      asn1.RawValue
		Algorithm algorithm
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: info}, algorithm{ecdsaWithSHA256}, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}})
}

// The key of the first enrollment; key and certificate in one file, so that they change together; and whom to trust.
const keyFile, identityFile, rootsFile = "device.key", "device.pem", "ca.crt"

// load gives the identity that the folder holds, or nothing.
func load(folder string) (*identity, error) {
	pair, err := os.ReadFile(filepath.Join(folder, identityFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	roots, err := os.ReadFile(filepath.Join(folder, rootsFile))
	if err != nil {
		return nil, err
	}
	return &identity{pair, roots}, nil
}

// keep writes what the server has issued.
func keep(folder string, key *ecdsa.PrivateKey, issued *edgemesh.Identity) (*identity, error) {
	if issued == nil {
		return nil, errors.New("the server answered without a certificate")
	}
	keyPem, err := pemOf(key)
	if err != nil {
		return nil, err
	}
	shown := &identity{
		pair:  append([]byte(strings.Join(issued.CertificateChainPem, "")), keyPem...),
		roots: rootsOf(issued.GetTrustBundle()),
	}
	if _, err := tls.X509KeyPair(shown.pair, shown.pair); err != nil {
		return nil, fmt.Errorf("the certificate is for another key: %w", err)
	}
	if err := write(folder, rootsFile, shown.roots); err != nil {
		return nil, err
	}
	return shown, write(folder, identityFile, shown.pair)
}

func keyIn(folder string) (*ecdsa.PrivateKey, error) {
	text, err := os.ReadFile(filepath.Join(folder, keyFile))
	if err == nil {
		block, _ := pem.Decode(text)
		if block == nil {
			return nil, fmt.Errorf("%s in %s is not PEM", keyFile, folder)
		}
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if ours, ok := key.(*ecdsa.PrivateKey); ok && err == nil {
			return ours, nil
		}
		return nil, fmt.Errorf("%s in %s is no P-256 key", keyFile, folder)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err = pemOf(key)
	if err != nil {
		return nil, err
	}
	return key, write(folder, keyFile, text)
}

func pemOf(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// write replaces a file as a whole, for its owner alone.
func write(folder, name string, text []byte) error {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	fresh := filepath.Join(folder, fmt.Sprintf(".%s.%d", name, time.Now().UnixNano()))
	if err := os.WriteFile(fresh, text, 0o600); err != nil {
		return err
	}
	return os.Rename(fresh, filepath.Join(folder, name))
}
